"""The statistical tests of the gate, with torch and the standard library only, because the gate runs
on hosts without SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

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


def quantile(ordered: Tensor, q: float) -> float:
    """The quantile q of ascending values [n], interpolated linearly between order statistics."""
    at = q * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return float(low + (high - low) * (at - math.floor(at)))
