"""Statistics over records: pure functions.

    metrics       what is measured of one launch
    steady_state  the initial transient (MSER-5), trends, growth of a backlog
    under_load    the same of requests that arrive over time: percentiles, steady state, goodput
    energy        joules per token and request, from sampled power
    intervals     one effect: interval, p-value, detectable effect, verdict
    moderation    an effect's variance, moderated by those of all effects of a study
    contrasts     what each factor buys beside others
    linear_model  the linear model of a two-level factorial
    residuals     do the data look as the intervals assume?
    ceiling       the roofline bound of a workload
    moderated_coverage  the same of moderated variances, and false alarms of a family
    coverage      how often an interval holds the truth, by simulation

Imports nothing of reports/.
"""
