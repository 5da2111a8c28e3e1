"""How many blocks a study has, and what it will be able to see: decided before it starts.

The bounds on the number of blocks are those for which the coverage of the intervals is simulated
(reports/statistics/coverage.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from statistics import median, stdev
from typing import Any

from experiments.records import store

MIN_BLOCKS, MAX_BLOCKS = 2, 40
MIN_BLOCKS_BOOTSTRAP = 6
"""Below this number of blocks a resampling interval means nothing (Hoefler and Belli, rule 5)."""
DEFAULT_BLOCKS = 6
POWER = 0.8
_LARGEST_QUANTILE = 1e6
"""Of Student's t: beyond it scipy has no numbers for the noncentral distribution, and no effect is that large."""


def least_blocks(bootstrap: bool) -> int:
    """What the statistics that a study asks for need."""
    return MIN_BLOCKS_BOOTSTRAP if bootstrap else MIN_BLOCKS


def blocks_within(
    blocks: int | None, budget_s: float | None, bootstrap: bool, num_cells: int, launch_s: float
) -> int:
    """The number of blocks of a design. Raises ValueError, naming the key of `design`, where the
    budget does not hold them.
    """
    if budget_s is None:
        return DEFAULT_BLOCKS if blocks is None else blocks
    block_s = num_cells * launch_s
    fit, least = min(MAX_BLOCKS, math.floor(budget_s / block_s + 1e-9)), least_blocks(bootstrap)
    wanted = least if blocks is None else blocks
    if fit < wanted:
        need = f"{wanted} blocks of {num_cells} cells at {launch_s:g} s a launch take {wanted * block_s:g} s"
        holds = f"{budget_s:g} s hold {fit}" if fit else f"{budget_s:g} s do not hold one"
        other = (
            f"design.blocks from {least} to {fit}"
            if fit >= least
            else f"fewer cells; the least is {least} blocks"
        )
        raise ValueError(
            f"design.budget_s: {need}, {holds}. Allowed: {wanted * block_s:g} s or more, or {other}"
        )
    return fit if blocks is None else blocks


@lru_cache(maxsize=256)
def detectable_in_sd(n: int, alpha: float, power: float, df: float | None = None) -> float:
    """The mean, in standard deviations, that a two-sided paired t test of n samples finds with the
    given power, above alpha. df: degrees of freedom of the deviation; n - 1 if not given.

    The other tail is left out: at the powers that anybody asks for it is nothing, and scipy has no
    number for it far out.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t  # a second to load, and seldom needed

    freedom = n - 1 if df is None else df
    limit = t.ppf(1 - alpha / 2, freedom)
    if limit > _LARGEST_QUANTILE:
        return math.inf

    def lacking(mean: float) -> float:
        return float(nct.sf(limit, freedom, mean * math.sqrt(n))) - power

    most = 1.0
    while lacking(most) < 0:
        most *= 2
    return float(brentq(lacking, 0.0, most))


def detectable(
    sd_log: float, n: int, alpha: float, power: float = POWER, df: float | None = None
) -> float:
    """The smallest relative change (0.03: 3 %) that n blocks of this noise find with this power,
    alone in its family; infinite where so few blocks find none at such an alpha.
    """
    log_ratio = detectable_in_sd(n, alpha, power, df) * sd_log if sd_log > 0 else 0.0
    return math.expm1(log_ratio) if log_ratio < 700 else math.inf


def previous_noise(plan: dict[str, Any], folders: Iterable[Path]) -> tuple[float, Path] | None:
    """Noise of the latest earlier execution of this study on this profile: the median, over cells
    and workloads, of the standard deviation over blocks of log(cell / reference) of throughput; and
    its folder. `folders`: the latest first.
    """
    for folder in folders:
        try:
            earlier = store.read_plan(folder / store.PLAN)
            if any(earlier[key]["name"] != plan[key]["name"] for key in ("study", "profile")):
                continue
            spreads = _spreads(earlier, store.counted(store.read(folder)))
        except store.RecordError:
            # what an old folder cannot tell is for `report` to say; it must not stop a new study
            continue
        if spreads:
            return median(spreads), folder
    return None


def _spreads(plan: dict[str, Any], launches: list[dict[str, Any]]) -> list[float]:
    log_rates: dict[tuple[str, str], dict[int, float]] = {}
    for record in launches:
        for name, work in record["workloads"].items():
            rate = math.log(work["output_tokens"] / work["duration_s"])
            log_rates.setdefault((name, record["cell"]), {})[record["block"]] = rate
    (base,) = (name for name, cell in plan["cells"].items() if cell["role"] == "baseline")
    spreads = []
    for (workload, cell), by_block in log_rates.items():
        reference = log_rates.get((workload, base), {})
        ratios = [
            value - reference[block] for block, value in by_block.items() if block in reference
        ]
        if cell != base and len(ratios) > 2:
            spreads.append(stdev(ratios))
    return spreads
