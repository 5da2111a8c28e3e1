"""Whether a run reached a steady state, and how much of its beginning does not belong to it.

The initial transient is cut by MSER-5: batch means of 5, and of all cuts the one with the smallest
estimated squared error of the mean of what is left (K. P. White, "An effective truncation heuristic for
bias reduction in simulation output", Simulation 69, 1997; MSER-5: White, Cobb and Spratt, "A comparison of five
steady-state truncation heuristics for simulation", Winter Simulation Conference 2000). A minimum in the
second half means that the run is too short to tell.

On one short run the rule cuts behind chance peaks. So, as Hoad, Robinson and Davies do ("Automating
warm-up length estimation", Journal of the Operational Research Society 61, 2010), it is applied to the mean
of several: all launches that served the same requests. They get one cut, and are judged on the same
requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

BATCH = 5
LEAST_BATCHES = 5
"""Of fewer, a variance says nothing: the last cuts that are looked at leave so many."""
TREND_BATCHES, TREND_ALPHA = 20, 0.01


def mser(values: Floats) -> int | None:
    """White's cut of a series [n]: the d from 0 on that minimizes the sum of squared deviations of
    values[d:] from their mean over (n - d) squared; of equal ones the smallest. None if it lies in
    the second half, or for fewer than 2 * LEAST_BATCHES values.
    """
    n = len(values)
    if n < 2 * LEAST_BATCHES:
        return None
    centred = values - values.mean()  # sums of squares then keep their digits
    left = np.arange(n, 0, -1)
    sums = np.cumsum(centred[::-1])[::-1]
    squares = np.cumsum(centred[::-1] ** 2)[::-1]
    errors = np.maximum(squares - sums**2 / left, 0.0) / left**2
    cut = int(np.argmin(errors[: n - LEAST_BATCHES + 1]))
    return cut if cut <= n // 2 else None


def mser5(values: Floats) -> int | None:
    """How many of the first values [n] to leave out: `mser` of the means of 5 values each. Up to 4
    values at the end are in no batch.
    """
    batches = len(values) // BATCH
    cut = mser(values[: batches * BATCH].reshape(batches, BATCH).mean(axis=1)) if batches else None
    return None if cut is None else BATCH * cut


def common_cut(series: Sequence[Floats]) -> int | None:
    """The cut of runs of the same requests, each [n]: `mser5` of their mean. Each is divided by its
    own mean, so that a slow run does not decide alone. None without any run.
    """
    if not series:
        return None
    scaled = [run / mean if (mean := float(run.mean())) > 0 else run for run in series]
    return mser5(np.mean(scaled, axis=0))


def has_trend(samples: Floats) -> bool:
    """Whether a series rises or falls: Kendall's test on the means of 20 batches, at 1 %."""
    size = len(samples) // TREND_BATCHES
    if size < 1:
        return False
    means = samples[: size * TREND_BATCHES].reshape(TREND_BATCHES, size).mean(axis=1)
    if np.ptp(means) == 0:
        return False
    return bool(stats.kendalltau(np.arange(TREND_BATCHES), means).pvalue < TREND_ALPHA)


def growth(backlog: Floats) -> float:
    """By how many requests the backlog grows with each arrival: from the mean of the first quarter of
    the arrivals to that of the last.
    """
    quarter = max(1, len(backlog) // 4)
    return float(backlog[-quarter:].mean() - backlog[:quarter].mean()) / max(
        1, len(backlog) - quarter
    )
