"""What an optimization costs that changes the output on purpose: its price.

    rules         what is measured, default margins, and which configurations have a price
    distances     KL divergence, top choice and perplexity of one distribution against another
    reference     the unquantized reference, and the noise floor of the compute dtype
    measure       measures the lossy configurations of a plan and appends price records
    clusters      intervals and tests of a mean per token, with prompts as clusters
    verdicts      within margin, outside, undecided: non-inferiority, Holm over the metrics
    planted       roundings and planted errors, for tests of the power
    coverage      simulates what the intervals and verdicts promise
    tasks         small tasks without a network: exact match, McNemar's test

May import engines, gate, host, records and workloads. All but coverage and tasks run on a bare GPU
host. docs/methodology.md explains the method.
"""
