"""How often moderated intervals hold the truth, and how often a family of them raises a false alarm:
simulated studies whose cells share a baseline, and are not equally noisy. coverage.py prints it.

The estimators are those of the reports (moderation.py). Nothing is planted but noise, so every
ratio is 1 in truth, and whatever Holm's method rejects is a false alarm: it rejects something just
where the smallest p-value times the number of effects is below alpha.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reports.statistics.moderation import fit_prior, moderate, settle

Floats = NDArray[np.float64]
Method = Literal["settled", "Smyth", "per effect"]
Spread = Literal[
    "equal", "half", "baseline", "quiet baseline", "one", "between", "heavy", "left out"
]
LOUD = math.sqrt(10)
"""Standard deviation of a cell with ten times the variance of the others."""
SPREADS: dict[Spread, str] = {
    "equal": "equal in all cells",
    "half": "every other cell 10 times the variance",
    "baseline": "baseline and A/A arm 10 times the variance",
    "quiet baseline": "baseline and A/A arm a tenth of the variance",
    "one": "one cell 10 times the variance",
    "between": "each cell's own, over a range of 10 times",
    "heavy": "heavy tails: Student's t, 4 degrees of freedom",
    "left out": "everything on 10 times the variance; ratios to it",
}
CELLS, BLOCKS, STUDIES = (10, 20), (2, 3, 4, 6), 2_000
ALPHA = 0.05


@dataclass(frozen=True)
class Found:
    """Shares of studies: coverage of all effects, of the effect that is covered least, and studies
    with a false alarm.
    """

    mean: float
    least: float
    false_alarm: float


def simulate(
    spread: Spread, cells: int, blocks: int, method: Method = "settled", seed: int = 0
) -> Found:
    """The first cell is the baseline, the second its A/A arm, the last everything on."""
    rng = np.random.default_rng([seed, cells, blocks])
    size = (STUDIES, cells, blocks)
    noise = rng.standard_t(4, size) / math.sqrt(2) if spread == "heavy" else rng.normal(size=size)
    logs = rng.normal(0, 5, (STUDIES, 1, blocks)) + noise * _deviations(rng, spread, cells)
    if spread == "left out":
        ratios = logs[:, -1:] - logs[:, :-1]
        asked = ratios[:, 2:]
    else:
        ratios = logs[:, 1:] - logs[:, :1]
        asked = ratios[:, 1:]
    df, own = blocks - 1, asked.var(axis=-1, ddof=1)
    prior_variances = ratios.var(axis=-1, ddof=1)
    d0, smyth = (part[:, None] for part in fit_prior(prior_variances, df))
    found: dict[Method, Callable[[], tuple[Floats, Floats]]] = {
        "settled": lambda: settle(own, df, d0, prior_variances.mean(axis=-1, keepdims=True)),
        "Smyth": lambda: moderate(own, df, d0, smyth),
        "per effect": lambda: (own, np.full_like(own, df)),
    }
    variance, freedom = found[method]()
    t = np.abs(asked.mean(axis=-1)) / np.sqrt(variance / blocks)
    p = 2 * stats.t.sf(t, freedom)
    covered = (p > ALPHA).mean(axis=0)
    alarms = p.min(axis=-1) * p.shape[-1] < ALPHA
    return Found(float(covered.mean()), float(covered.min()), float(alarms.mean()))


def _deviations(rng: np.random.Generator, spread: Spread, cells: int) -> Floats:
    """[1 or studies, cells, 1]: standard deviation of each cell's noise."""
    if spread == "between":
        drawn = 10 ** rng.uniform(-0.25, 0.25, (STUDIES, cells, 1))
        drawn[:, 1] = drawn[:, 0]  # the A/A arm is the baseline again
        return drawn
    deviations = np.ones((1, cells, 1))
    if spread == "half":
        deviations[:, 3::2] = LOUD
    if spread in ("baseline", "quiet baseline"):
        deviations[:, :2] = LOUD if spread == "baseline" else 1 / LOUD
    if spread in ("one", "left out"):
        deviations[:, -1] = LOUD
    return deviations


def table() -> str:
    """The second table of the methodology page, in Markdown."""
    kinds: list[tuple[Method, str, tuple[Spread, ...], tuple[int, ...]]] = [
        ("settled", "moderated", tuple(SPREADS), CELLS),
        ("Smyth", "as in Smyth's paper", ("equal", "half", "baseline", "one"), CELLS[1:]),
        ("per effect", "its own", ("equal", "half", "baseline", "one"), CELLS[1:]),
    ]
    rows = [
        [
            words,
            SPREADS[spread],
            str(cells),
            *(_shown(simulate(spread, cells, n, method)) for n in BLOCKS),
        ]
        for method, words, spreads, sizes in kinds
        for spread in spreads
        for cells in sizes
    ]
    head = ["variance", "noise of a launch", "cells", *(f"{n} blocks" for n in BLOCKS)]
    lines = [head, ["---", "---", "--:", *("--:" for _ in BLOCKS)], *rows]
    note = (
        "Each entry: coverage of 95 % intervals over all effects / of the effect that is covered least / share of studies in which "
        f"Holm's method calls anything different although nothing is. {STUDIES:,} synthetic studies each."
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", note])


def _shown(found: Found) -> str:
    return f"{100 * found.mean:.1f} / {100 * found.least:.1f} / {100 * found.false_alarm:.1f} %"
