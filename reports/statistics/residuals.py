"""Do the data look as the intervals assume? Residuals of the log metric once cells and blocks are
taken out.

Student's t over blocks needs log-ratios that are roughly normal. Six of them tell little, but all
cells of a study together tell
something: value - mean of its cell - mean of its block + mean of all, over the complete blocks of a
workload.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

MIN_BLOCKS = 3


def residuals(by_cell: Mapping[str, Mapping[int, float]]) -> np.ndarray:
    """[cells, complete blocks] residuals of log values; no columns where no block is complete."""
    complete = sorted(set.intersection(*map(set, by_cell.values()))) if by_cell else []
    logs = np.array(
        [[math.log(values[block]) for block in complete] for values in by_cell.values()]
    )
    if not logs.size:
        return logs
    return logs - logs.mean(axis=1, keepdims=True) - logs.mean(axis=0, keepdims=True) + logs.mean()


def diagnose(by_cell: Mapping[str, Mapping[int, float]]) -> dict[str, Any] | None:
    """{"n", "sd", "skewness", "p_normal", "largest", "cell", "block"} of a workload; None with
    fewer than three complete blocks.

    p_normal: Shapiro-Wilk; small means that normality is doubtful. skewness: 0 for symmetric noise,
    2 for an exponential.
    largest: the residual farthest from 0 in standard deviations, and where it is.
    """
    found = residuals(by_cell)
    if found.ndim < 2 or found.shape[1] < MIN_BLOCKS or len(found) < 2 or np.ptp(found) == 0:
        return None
    cells, blocks = found.shape
    # the means took the rest
    flat, sd = found.ravel(), math.sqrt(float((found**2).sum()) / ((cells - 1) * (blocks - 1)))
    cell, block = np.unravel_index(np.argmax(np.abs(found)), found.shape)
    complete = sorted(set.intersection(*map(set, by_cell.values())))
    return {
        "n": flat.size,
        "sd": sd,
        "skewness": float(stats.skew(flat)),
        "p_normal": float(stats.shapiro(flat).pvalue),
        "largest": float(found[cell, block] / sd),
        "cell": list(by_cell)[cell],
        "block": complete[block],
    }
