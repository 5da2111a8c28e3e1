"""The statistical tests of the gate, with torch and the standard library only, because the gate runs
on hosts without SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor


def quantiles(values: Tensor) -> dict[str, float]:
    """The quantiles of values [n] that records hold; the values need not be sorted."""
    ordered = values.sort().values
    result = {}
    for name, q in (("q50", 0.5), ("q99", 0.99), ("q999", 0.999), ("max", 1.0)):
        result[name] = quantile(ordered, q)
    return result


def binomial_limit(n: int, p: float, alpha: float) -> int:
    """The smallest k with P(X > k) <= alpha for X ~ Binomial(n, p)."""
    # own code: the standard library has no binomial distribution, and hosts of the gate have no SciPy
    tail = 1.0
    for k in range(n + 1):
        log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        tail -= math.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))
        if tail <= alpha:
            return k
    return n


def normal_limit(alpha: float) -> float:
    """The z with P(Z > z) = alpha."""
    return -NormalDist().inv_cdf(alpha)


def self_normalized_excess(differences: Sequence[float]) -> float:
    """sum(d) / sqrt(sum(d^2)) with one d per request: a z-score in which tokens of one request that
    repeat the same near-tie count once.

    It cannot exceed sqrt(requests), so a handful of requests never fail this rule; the bound judges
    them.
    """
    scale = math.sqrt(sum(d * d for d in differences))
    return sum(differences) / scale if scale > 0 else 0.0


def dispersion(
    sums: Sequence[float], variances: Sequence[float], drifts: Sequence[float], factor: float
) -> float:
    """Whether sums of mean 0 and known variance, one per request, are farther from 0 than they may
    be: a z-score, large where some requests are too likely and others too unlikely, which cancels
    in the sum over all. Each sum is first moved towards 0 by `factor` times its drift, the shift
    that is allowed.

    The mean of (sum / deviation)^2 - 1 is 0, and it is skewed to the right, which makes a
    self-normalized sum of it exceed a limit more rarely than a normal variable does.
    """
    return self_normalized_excess(
        [
            max(0.0, abs(total) - factor * abs(drift)) ** 2 / variance - 1
            for total, variance, drift in zip(sums, variances, drifts, strict=True)
            if variance > 0
        ]
    )


def largest_rise(steps: Tensor) -> Tensor:
    """The largest sum of consecutive entries of steps [n], n >= 1."""
    total = steps.cumsum(0)
    before = torch.cat([total.new_zeros(1), total[:-1]]).cummin(0).values
    return (total - before).amax()


LAST_TOKENS = (1, 2, 4, 8)
WRONG_SHARES = (1.0, 0.1, 0.01)
"""Of the requests whose ends are looked at together: the ends' lengths, and the shares of requests that may be wrong."""


def evidence_of_ends(steps: Sequence[Tensor], budgets: Sequence[int]) -> float:
    """The log evidence that many answers end in tokens that the reference finds too unlikely, each
    of them far too few to be noticed.

    steps: of each request, the logs of factors whose mean is at most 1, given what came before.
    budgets: max_tokens of each. An end are the last positions of its budget, not of its answer, as
    an answer that stops by itself ends in tokens that were chosen for that. For each length of an
    end and each share w, prod (1 - w + w factor) over the requests has a mean of at most 1; so has
    the mean of all of these, which exceeds 1 / level with a probability of at most that level
    (Markov's inequality), for any number of requests.
    """
    logs = []
    for last in LAST_TOKENS:
        ends = [s[max(0, n - last) :].sum() for s, n in zip(steps, budgets, strict=True)]
        factors = torch.stack(ends).exp()  # of nothing: 1
        logs += [torch.log1p(share * (factors - 1)).sum() for share in WRONG_SHARES]
    return float(torch.stack(logs).logsumexp(0)) - math.log(len(logs))


def quantile(ordered: Tensor, q: float) -> float:
    """The quantile q of ascending values [n], interpolated linearly between order statistics."""
    at = q * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return float(low + (high - low) * (at - math.floor(at)))
