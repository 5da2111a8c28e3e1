"""Intervals and tests of a mean per token, where tokens come in prompts.

The tokens of a prompt are not independent of each other, prompts are: the prompt is the *cluster*
that is sampled. A mean over all tokens is a ratio of two sums over prompts, so its standard error is
that of a ratio estimator (Cochran, *Sampling Techniques*, 3rd ed. 1977, sections 6.3 and 9A.1).

Prices are skewed: a few prompts cost much more than the others. Student's t interval then misses on
the side that matters, the upper one. The interval used is the bootstrap-t (Efron, *The jackknife,
the bootstrap and other resampling plans*, 1982, section 10.10; Hall, *The Bootstrap and Edgeworth
Expansion*, 1992, chapter 3, shows that its one-sided error shrinks with 1/n instead of 1/sqrt(n)):
prompts are drawn with replacement, and the studentized mean of each draw takes the place of
Student's t. `coverage.py` compares it with the alternatives; docs/methodology.md has the table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 9_999
_AT_A_TIME = 500_000
"""Prompts that are drawn at a time, which bounds the memory of a bootstrap."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean per token, its standard error, and the studentized means of the bootstrap, in ascending
    order: (mean of a draw - mean) / standard error of the draw.
    """

    mean: float
    error: float
    studentized: Array

    def interval(self, level: float) -> tuple[float, float]:
        """The two-sided interval that misses with probability `level`."""
        if self.error == 0:
            return self.mean, self.mean
        place = max(0, math.floor((len(self.studentized) + 1) * level / 2) - 1)
        low, high = self.studentized[place], self.studentized[-1 - place]
        return float(self.mean - high * self.error), float(self.mean - low * self.error)

    def p_below(self, margin: float) -> float:
        """The p-value against "the true mean is `margin` or more": small where it is below."""
        if self.error == 0:
            return 0.0 if self.mean < margin else 1.0
        place = (self.mean - margin) / self.error
        found = int(np.searchsorted(self.studentized, place, side="right"))
        return (1 + found) / (1 + len(self.studentized))

    def p_above(self, margin: float) -> float:
        """The p-value against "the true mean is `margin` or less"."""
        if self.error == 0:
            return 0.0 if self.mean > margin else 1.0
        place = (self.mean - margin) / self.error
        found = len(self.studentized) - int(np.searchsorted(self.studentized, place, side="left"))
        return (1 + found) / (1 + len(self.studentized))


def mean_per_token(
    totals: Sequence[float],
    tokens: Sequence[int],
    seed: str,
    draws: int = DRAWS,
    least_error: float = 0.0,
) -> Mean:
    """The mean of totals [prompts], each a sum over so many `tokens` [prompts]. seed: any text; the
    same text gives the same draws. least_error: no standard error is taken to be smaller, neither
    that of the mean nor those of the draws. Raises ValueError for fewer than two prompts or an
    empty one.
    """
    if len(totals) != len(tokens) or len(totals) < 2 or min(tokens) < 1:
        raise ValueError(
            f"{len(totals)} totals of {len(tokens)} prompts, the shortest of {min(tokens, default=0)} tokens; "
            "allowed: one total for each of two prompts or more, none of them empty"
        )
    sums, counts = np.asarray(totals, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    mean, error = (float(value) for value in ratio(sums, counts))
    error = max(error, least_error)
    if error == 0:
        return Mean(mean, 0.0, np.zeros(0))
    digest = hashlib.sha256(seed.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    parts = []
    for size in _parts(draws, len(sums)):
        drawn = rng.integers(len(sums), size=(size, len(sums)))
        means, errors = ratio(sums[drawn], counts[drawn])
        errors = np.maximum(errors, least_error)
        # a draw of one prompt again and again has no spread: it is as far away as can be
        away = np.where(means > mean, np.inf, np.where(means < mean, -np.inf, 0.0))
        parts.append(np.divide(means - mean, errors, out=away, where=errors > 0))
    return Mean(mean, error, np.sort(np.concatenate(parts)))


def ratio(totals: Array, tokens: Array) -> tuple[Array, Array]:
    """Sum of totals over sum of tokens, and its standard error, along the last axis: [..., prompts].

    The error is that of the residuals total - mean x tokens, divided by the mean length of a prompt.
    """
    n = totals.shape[-1]
    mean = totals.sum(-1) / tokens.sum(-1)
    residuals = totals - mean[..., None] * tokens
    spread = np.sqrt((residuals**2).sum(-1) / (n - 1) / n)
    return mean, spread / tokens.mean(-1)


def _parts(draws: int, prompts: int) -> list[int]:
    size = max(1, _AT_A_TIME // prompts)
    return [min(size, draws - first) for first in range(0, draws, size)]
