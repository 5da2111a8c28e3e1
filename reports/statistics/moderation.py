"""Moderated variances: what all effects of a study tell about the noise of each.

With three blocks an effect has two degrees of freedom for its own variance, and a 95 % interval of
4.3 standard errors either way. The other effects of the same workload and metric were measured in
the same blocks, on the same machine. Smyth (2004), "Linear models and empirical Bayes methods for
assessing differential expression in microarray experiments", takes the variances of all effects as
draws from one scaled inverse chi-squared distribution, a prior of d0 degrees of freedom around s0^2,
and replaces the variance s^2 of an effect, of d degrees of freedom, by

    s~^2 = (d0 s0^2 + d s^2) / (d0 + d)        with d0 + d degrees of freedom.

d0 is estimated from how far the logs of the variances lie apart: they scatter by trigamma(d / 2) by
themselves, and what is beyond that is trigamma(d0 / 2).

Effects of one study are not the independent genes of that paper. All of them share the baseline, so
their variances are correlated, look alike for that reason too, and d0 comes out too large; and cells
may differ in noise. `settle` is therefore more cautious in three places. Simulation decided which
(coverage.py; docs/adr/0010):

    - the prior counts for at most half as much as the effect's own data, d0 <= d / 2;
    - s0^2 is the mean of the variances, which is larger than Smyth's estimate;
    - no variance is taken to be smaller than the effect itself shows it to be, s~^2 >= s^2.

The first and the third together mean that whatever the noise of the other cells is, an interval is
never narrower than the effect's own standard error times Student's quantile for 1.5 d degrees of
freedom.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

MIN_EFFECTS = 9
"""The ratios of a study with ten cells, the smallest for which coverage is simulated; with fewer, every effect
keeps its own variance."""
MOST_PRIOR = 0.5
"""Most degrees of freedom of the prior, as a share of the effect's own."""
_LEAST_VARIANCE = 1e-5
"""A fraction of the median variance, as a variance of 0 has no logarithm."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prior:
    """What the ratios of all cells to one of them say of the variance of such a log-ratio, on one
    workload and metric.

    df: d0 as estimated, infinite where the variances differ no more than chance explains.
    variance: s0^2, their mean. effects: how many there were.
    """

    df: float
    variance: float
    effects: int


def prior_of(variances: ArrayLike, df: ArrayLike) -> Prior | None:
    """The prior of a study's effects from their sample variances and degrees of freedom. None for
    fewer than MIN_EFFECTS, and where nothing varies.
    """
    found, freedom = np.asarray(variances, dtype=np.float64), np.asarray(df, dtype=np.float64)
    if len(found) < MIN_EFFECTS or np.median(found) <= 0:
        return None
    return Prior(
        float(fit_prior(found, freedom)[0]),
        float(np.average(found, weights=np.broadcast_to(freedom, found.shape))),
        len(found),
    )


def fit_prior(variances: Floats, df: ArrayLike) -> tuple[Floats, Floats]:
    """Smyth's estimates (d0, s0^2) from sample variances and their degrees of freedom, along the
    last axis, which holds the effects: equations of section 6.2 of the paper.
    """
    freedom = np.broadcast_to(np.asarray(df, dtype=np.float64), variances.shape)
    floor = _LEAST_VARIANCE * np.median(variances, axis=-1, keepdims=True)
    centred = (
        np.log(np.maximum(variances, floor)) - special.digamma(freedom / 2) + np.log(freedom / 2)
    )
    mean = centred.mean(axis=-1)
    beyond = centred.var(axis=-1, ddof=1) - special.polygamma(1, freedom / 2).mean(axis=-1)
    apart = beyond > 0
    half = _inverse_trigamma(np.where(apart, beyond, 1.0))
    d0 = np.where(apart, 2 * half, np.inf)
    s0 = np.exp(np.where(apart, mean + special.digamma(half) - np.log(half), mean))
    return d0, s0


def moderate(
    variance: ArrayLike, df: ArrayLike, prior_df: ArrayLike, prior_variance: ArrayLike
) -> tuple[Floats, Floats]:
    """Smyth's (s~^2, d0 + d): the effect's own variance for d0 = 0, the prior's for d0 infinite."""
    own, d = np.asarray(variance, dtype=np.float64), np.asarray(df, dtype=np.float64)
    d0 = np.asarray(prior_df, dtype=np.float64)
    weight = 1 / (1 + d / np.where(d0 > 0, d0, 1.0)) * (d0 > 0)  # d0 / (d0 + d), 1 at infinity
    return weight * np.asarray(prior_variance) + (1 - weight) * own, d0 + d


def settle(
    variance: ArrayLike, df: ArrayLike, prior_df: ArrayLike, prior_variance: ArrayLike
) -> tuple[Floats, Floats]:
    """The variance and degrees of freedom that a report uses: `moderate` with d0 at most d / 2, and
    never less than the effect's own variance.
    """
    most = MOST_PRIOR * np.asarray(df, dtype=np.float64)
    found, freedom = moderate(variance, df, np.minimum(prior_df, most), prior_variance)
    return np.maximum(found, variance), freedom


def _inverse_trigamma(value: Floats) -> Floats:
    """y with trigamma(y) = value > 0, by Newton's method on 1 / trigamma, which is nearly a straight
    line; it approaches from below (the paper's appendix).
    """
    y = 0.5 + 1 / value
    for _ in range(50):
        trigamma = special.polygamma(1, y)
        step = trigamma * (1 - trigamma / value) / special.polygamma(2, y)
        y = y + step
        if np.all(np.abs(step) <= 1e-10 * y):
            break
    return np.asarray(y)
