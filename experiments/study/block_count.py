"""The number of blocks of a study and its statistical power, computed before it starts.

The number of blocks is limited to the range for which the coverage of the intervals is simulated
(reports/statistics/coverage.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from statistics import median, stdev

from experiments.records import store
from experiments.records.types import LaunchRecord, Plan

MIN_BLOCKS, MAX_BLOCKS = 2, 40
MIN_BLOCKS_BOOTSTRAP = 6
"""With fewer blocks a bootstrap interval is meaningless (Hoefler and Belli, rule 5)."""
DEFAULT_BLOCKS = 6
POWER = 0.8
_LARGEST_QUANTILE = 1e6
"""Limit on quantiles of Student's t: beyond it scipy cannot evaluate the noncentral distribution."""


def least_blocks(bootstrap: bool) -> int:
    """The minimum number of blocks."""
    return MIN_BLOCKS_BOOTSTRAP if bootstrap else MIN_BLOCKS


def blocks_within(
    blocks: int | None, budget_s: float | None, bootstrap: bool, num_cells: int, launch_s: float
) -> int:
    """The number of blocks of a design. Raises ValueError if they do not fit into the budget."""
    if budget_s is None:
        return DEFAULT_BLOCKS if blocks is None else blocks
    block_s = num_cells * launch_s
    fit, least = min(MAX_BLOCKS, math.floor(budget_s / block_s + 1e-9)), least_blocks(bootstrap)
    wanted = least if blocks is None else blocks
    if fit < wanted:
        need = f"{wanted} blocks of {num_cells} cells at {launch_s:g} s per launch take {wanted * block_s:g} s"
        holds = f"but {budget_s:g} s are enough for {fit or 'none'}"
        other = (
            f"set design.blocks to {least} to {fit}"
            if fit >= least
            else f"use fewer cells (the minimum is {least} blocks)"
        )
        raise ValueError(
            f"design.budget_s: {need}, {holds}. Raise it to {wanted * block_s:g} s, or {other}"
        )
    return fit if blocks is None else blocks


@lru_cache(maxsize=256)
def detectable_in_sd(n: int, alpha: float, power: float, df: float | None = None) -> float:
    """The smallest mean, in standard deviations, that a two-sided paired t test of n samples
    detects with the given power. df: degrees of freedom of the deviation; n - 1 if not given.

    The other tail is neglected: at usual powers it is negligible, and scipy cannot evaluate it far
    out.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t  # takes a second to import and is rarely needed

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
    """The smallest relative change (0.03: 3 %) that n blocks with this noise detect with this power,
    without a correction for multiple tests. Infinite if n is too small for any at this alpha.
    """
    log_ratio = detectable_in_sd(n, alpha, power, df) * sd_log if sd_log > 0 else 0.0
    return math.expm1(log_ratio) if log_ratio < 700 else math.inf


def half_width(sd_log: float, n: int, alpha: float) -> float:
    """By how much a Student's t interval of n blocks with this noise reaches beyond its ratio (0.09:
    the ratio divided and multiplied by 1.09). Infinite for a single block.
    """
    if n < MIN_BLOCKS:
        return math.inf
    from scipy.stats import t  # as above

    reach = float(t.ppf(1 - alpha / 2, n - 1)) * sd_log / math.sqrt(n)
    return math.expm1(reach) if reach < 700 else math.inf


def previous_noise(plan: Plan, folders: Iterable[Path]) -> tuple[float, Path] | None:
    """The noise of the latest execution of this study on this profile, and its folder: the median
    over cells and workloads of the standard deviation, over blocks, of log(throughput of the cell /
    throughput of the baseline). `folders`: latest first.
    """
    for folder in folders:
        try:
            earlier = store.read_plan(folder / store.PLAN)
            if _names(earlier) != _names(plan):
                continue
            spreads = _spreads(earlier, store.counted(store.read(folder)))
        except store.RecordError:
            # a damaged old folder must not stop a new study
            continue
        if spreads:
            return median(spreads), folder
    return None


def _names(plan: Plan) -> tuple[str, str]:
    return plan["study"]["name"], plan["profile"]["name"]


def _spreads(plan: Plan, launches: list[LaunchRecord]) -> list[float]:
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
