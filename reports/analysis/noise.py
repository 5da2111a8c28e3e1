"""Whose variance an effect is judged by, and with which others it is judged: what `statistics` of a
study asks for, and what the rounding of a metric allows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.records.types import Plan, PlannedStatistics
from reports.statistics.contrasts import Contrast, Lattice
from reports.statistics.metrics import GOODPUT, SUSTAINABLE
from reports.statistics.moderation import MIN_EFFECTS, Prior, prior_of
from reports.statistics.under_load import Transient

# {(metric, workload, the cell that the comparisons share): prior}; empty where every effect keeps its
# own variance
Priors = Mapping[tuple[str, str, str], Prior]
SHARED = ("baseline", "all", "reference")
"""Roles of the cells to which a report's tables compare others."""
# {metric: {workload: {cell: {block: value}}}}
Values = Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]

ALONE, TOGETHER, BETWEEN = "one alone", "everything on", "all but one"
"""The questions to which a ratio to the baseline belongs."""


def priors(values: Values, plan: Plan) -> Priors:
    """From the ratios of all other cells to one of the same block, for each cell that comparisons
    may share. {} for a study that does not ask for it.
    """
    if _asked(plan).get("variance") != "moderated":
        return {}
    found = {}
    for key, by_workload in values.items():
        for workload, by_cell in by_workload.items():
            for cell in by_cell:
                if (prior := _prior(by_cell, cell)) is not None:
                    found[key, workload, cell] = prior
    return found


def rounding(plan: Plan, starts: Mapping[str, Transient]) -> dict[tuple[str, str], float]:
    """By metric and workload, the standard deviation that rounding alone gives a log-ratio (Rule). A
    goodput counts requests; a sustainable rate is known to within the last step of its search. The
    error of each side is uniform over a step, whose variance is step**2 / 12. starts: of workloads
    that were served.
    """
    found = {}
    for name, entry in plan["workloads"].items():
        search = entry["params"].get("arrivals", {}).get("search")
        grid = math.log(search["within"]) if search else 0.0
        cut = starts[name].cut if name in starts else 0
        request = 1 / (entry["num_requests"] - cut)
        found[GOODPUT.key, name] = math.sqrt((grid**2 + request**2) / 6)
        if search:
            found[SUSTAINABLE.key, name] = grid / math.sqrt(6)
    return found


def _prior(by_cell: Mapping[str, Mapping[int, float]], shared: str) -> Prior | None:
    below = by_cell[shared]
    samples = [
        [math.log(value / below[block]) for block, value in above.items() if block in below]
        for cell, above in by_cell.items()
        if cell != shared
    ]
    usable = [sample for sample in samples if len(sample) > 1]
    return prior_of(
        [float(np.var(sample, ddof=1)) for sample in usable],
        [len(sample) - 1 for sample in usable],
    )


def scale_of(contrast: Contrast) -> float:
    """Variance of a contrast over that of a ratio of two cells, if all launches are equally noisy."""
    return sum(weight**2 for weight in contrast.values()) / 2


def question(cell: str, plan: Plan, lattice: Lattice) -> str:
    """The question that a cell's ratio to the baseline belongs to. In a study with joint families
    it is the same for all cells.
    """
    if _asked(plan).get("families") != "by_question":
        return ""
    if plan["cells"][cell]["role"] == "all":
        return TOGETHER
    points = {name: point for point, name in lattice.cell.items()}
    from_off = not points.get(lattice.baseline)
    return ALONE if from_off and len(points.get(cell, ())) == 1 else BETWEEN


def precision(effects: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """What a study has achieved on its metric, as medians over its changes and workloads:
    half_width, by how much an interval reaches beyond its ratio (0.09: divided and multiplied by 1.09);
    detectable, as in the table of effects; effects, how many. None without an interval.
    """
    found = [
        effect
        for effect in effects
        if effect["metric"] == metric
        and effect["role"] in ("treatment", "all")
        and effect["low"] is not None
        and effect["detectable"] is not None
    ]
    if not found:
        return None
    reach = [
        math.sqrt(effect["high"] / effect["low"]) - 1 if effect["low"] > 0 else math.inf
        for effect in found
    ]
    return {
        "half_width": statistics.median(reach),
        "detectable": statistics.median(effect["detectable"] for effect in found),
        "effects": len(found),
    }


def described(plan: Plan, found: Priors) -> dict[str, Any]:
    """The variance that the intervals rest on, as a report shows it. d0 is None if it is infinite."""
    asked = _asked(plan)
    return {
        "variance": asked.get("variance", "per_effect"),
        "families": asked.get("families", "joint"),
        "least_effects": MIN_EFFECTS,
        "priors": [
            {
                "metric": key,
                "workload": workload,
                "shared": shared,
                "effects": prior.effects,
                "d0": prior.df if math.isfinite(prior.df) else None,
                "sd": math.sqrt(prior.variance),
            }
            for (key, workload, shared), prior in found.items()
            if plan["cells"][shared]["role"] in SHARED
        ],
    }


def _asked(plan: Plan) -> PlannedStatistics:
    default: PlannedStatistics = {"variance": "per_effect", "families": "joint"}
    return plan["study"].get("statistics", default)
