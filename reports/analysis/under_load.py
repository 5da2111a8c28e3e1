"""What the launches of a study under load came to: a row for each workload and cell, the sustainable
rate of each cell, and the energy of every serving whose power was sampled.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.records.types import Plan
from reports import text
from reports.analysis.counting import Counted
from reports.analysis.types import Analysis, Effect
from reports.statistics import energy
from reports.statistics.intervals import measured_ratio, t_interval
from reports.statistics.metrics import SUSTAINABLE, THROUGHPUT
from reports.statistics.under_load import (
    LATENCY_OF,
    Requests,
    Transient,
    described,
    transient,
)


def transients(counted: Counted, plan: Plan) -> dict[str, Transient]:
    """The initial transient of each workload with arrivals, from all launches that count: every cell
    is judged on the same requests.
    """
    found = {}
    for workload in plan["workloads"]:
        launches = [
            Requests.of(work)
            for record in counted.launches
            if "load" in (work := record["workloads"][workload])
        ]
        if launches:
            found[workload] = transient(launches)
    return found


def under_load(
    counted: Counted, plan: Plan, starts: Mapping[str, Transient]
) -> dict[str, Any] | None:
    """The load of a study whose requests arrive over time; None for others. rows: one for each
    workload with arrivals and cell that has counted launches. found: one for each search and cell.
    """
    rules = plan["study"].get("load")
    if rules is None:
        return None
    rows, found = [], []
    for workload in plan["workloads"]:
        for cell in plan["cells"]:
            launches = [
                described(work, rules, starts[workload])
                for record in counted.launches
                if record["cell"] == cell and "load" in (work := record["workloads"][workload])
            ]
            if not launches:
                continue
            rows.append({"workload": workload, "cell": cell, **_row(launches, plan)})
            searches = [launch["search"] for launch in launches if launch["search"] is not None]
            if searches:
                found.append({"workload": workload, "cell": cell, **_searched(searches, plan)})
    return {"rules": dict(rules), "rows": rows, "found": found}


def _row(launches: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, Any]:
    """Means over launches with intervals, and the percentiles within the launch in the middle."""
    alpha = plan["study"].get("alpha", 0.05)
    quantiles: dict[str, dict[str, Any]] = {}
    for metric in LATENCY_OF:
        for percentile in (50, 90, 99):
            each = [
                launch["quantiles"][metric][percentile]
                for launch in launches
                if percentile in launch["quantiles"][metric]
            ]
            if not each:
                continue
            middle = sorted(each, key=lambda quantile: quantile.value)[(len(each) - 1) // 2]
            quantiles.setdefault(metric, {})[str(percentile)] = {
                **_over([quantile.value for quantile in each], alpha),
                "within": dataclasses.asdict(middle),
            }
    states = Counter(str(launch["state"]) for launch in launches)
    delivered = [launch["delivered"] for launch in launches if launch["delivered"] is not None]
    attained = [launch["attained"] for launch in launches if launch["attained"] is not None]
    goodputs = [launch["goodput"] for launch in launches if launch["goodput"] is not None]
    return {
        "launches": len(launches),
        "requests": launches[0]["requests"],
        "kept": min(launch["kept"] for launch in launches),
        "cut": max(launch["cut"] for launch in launches),
        "offered": _mean([launch["offered"] for launch in launches if launch["offered"]]),
        "delivered": min(delivered, default=None),
        "lateness_p99_s": max(launch["lateness_p99_s"] for launch in launches),
        "states": dict(sorted(states.items())),
        "growth": _mean([launch["growth"] for launch in launches]),
        "attained": _mean(attained),
        "goodput": _over(goodputs, alpha) if goodputs else None,
        "quantiles": quantiles,
    }


def _searched(searches: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, Any]:
    """The sustainable rate over launches; `none`: launches in which no rate passed; `beyond`: those
    in which the highest one did.
    """
    rates = [search["rate"] for search in searches if search["rate"] is not None]
    return {
        "launches": len(searches),
        "none": sum(search["rate"] is None for search in searches),
        "beyond": sum(search["stopped"] == "high passed" for search in searches),
        "trials": sum(len(search["trials"]) for search in searches),
        "lowest": min(search["trials"][0]["rate"] for search in searches),
        **_over(rates, plan["study"].get("alpha", 0.05)),
    }


def energies(counted: Counted, plan: Plan) -> list[dict[str, Any]]:
    """Mean energy of each workload, cell and source of power over the counted launches; [] where no
    launch has any.
    """
    rows = []
    for workload in plan["workloads"]:
        for cell in plan["cells"]:
            found = [
                each
                for record in counted.launches
                if record["cell"] == cell
                for each in energy.of_workload(record, workload)
            ]
            for source in sorted({each["source"] for each in found}):
                own = [each for each in found if each["source"] == source]
                rows.append(
                    {
                        "workload": workload,
                        "cell": cell,
                        "source": source,
                        "launches": len(own),
                        "watts": _mean([each["watts"] for each in own]),
                        "joules_per_output_token": _mean(
                            [each["joules_per_output_token"] for each in own]
                        ),
                        "joules_per_request": _mean([each["joules_per_request"] for each in own]),
                    }
                )
    return rows


def highest_rate(analysis: Analysis) -> str:
    """The workload whose requests arrive at the highest fixed rate; empty if every rate is searched for."""
    load = analysis["load"]
    searched = {row["workload"] for row in load["found"]}
    rates = {
        row["workload"]: row["offered"]
        for row in load["rows"]
        if row["offered"] and row["workload"] not in searched
    }
    return max(rates, key=lambda workload: rates[workload], default="")


MOST_NAMED = 3
"""How many configurations a sentence of the answer names, beside the baseline."""


def sustained(analysis: Analysis, workload: str) -> tuple[str, str] | None:
    """Which configurations sustain the highest rates, as the middle of a sentence, and the verdict on it;
    None for a workload whose rate is not searched for.
    """
    found = {row["cell"]: row for row in analysis["load"]["found"] if row["workload"] == workload}
    treated = [cell for cell in found if analysis["cells"][cell]["role"] in ("treatment", "all")]
    if not treated:
        return None
    share = text.percent(analysis["load"]["rules"]["attainment"], 0)
    rated = sorted(
        (cell for cell in treated if found[cell]["mean"] is not None),
        key=lambda cell: -found[cell]["mean"],
    )
    said = [f"{analysis['shown'][cell]} {_rate(found[cell])}" for cell in rated[:MOST_NAMED]]
    start = analysis["baseline"]
    if start in found:
        said.append(f"{analysis['shown'][start]} {_rate(found[start])}")
    verdicts = {
        effect["verdict"]
        for effect in analysis["effects"]
        if effect["metric"] == SUSTAINABLE.key
        and effect["workload"] == workload
        and effect["cell"] in treated
    }
    decided = next((word for word in ("faster", "slower") if word in verdicts), None)
    return (
        f"the highest rate at which {share} of requests meet the service level objective (SLO), in requests per second: "
        f"{', '.join(said)}",
        decided or (verdicts.pop() if len(verdicts) == 1 else "mixed"),
    )


def _rate(row: Mapping[str, Any]) -> str:
    """ "26.9 (22.3 to 32.4)", or that a search found none in some launches."""
    below = f"below {text.number(row['lowest'])} in {row['none']} of {row['launches']} launches"
    if row["mean"] is None:
        return below
    said = text.number(row["mean"])
    if row["low"] is not None and row["low"] < row["high"]:
        said += f" ({text.number(row['low'])} to {text.number(row['high'])})"
    return f"{said}, {below}" if row["none"] else said


def paced(analysis: Analysis, workload: str) -> str:
    """What happens to the longest gaps between tokens at the highest fixed rate, and what that costs in
    throughput, as the end of a sentence; empty for other workloads, and where nothing is decided.
    """
    if workload != highest_rate(analysis):
        return ""
    of: dict[str, dict[str, Effect]] = {}
    for effect in analysis["effects"]:
        if (
            effect["workload"] == workload
            and effect["n"]
            and effect["role"] in ("treatment", "all")
        ):
            of.setdefault(effect["metric"], {})[effect["cell"]] = effect
    gaps = sorted(
        (e for e in of.get(ITL_P99, {}).values() if e["verdict"] in ("faster", "slower")),
        key=measured_ratio,
    )
    said = []
    for gap in gaps[:MOST_NAMED]:
        its = f"{analysis['shown'][gap['cell']]} {_bounds(gap)}"
        if (rate := of.get(THROUGHPUT.key, {}).get(gap["cell"])) is not None:
            its += f" with {_bounds(rate)} of the output tokens per second"
        said.append(its)
    start = analysis["shown"][analysis["baseline"]]
    return f"; inter-token latency (ITL) p99 relative to {start}: {', '.join(said)}" if said else ""


ITL_P99 = "inter_token_latency_p99_s"


def _bounds(effect: Effect) -> str:
    return f"{text.ratio(effect['ratio'])} ({text.interval(effect['low'], effect['high'])})"


def _over(values: Sequence[float], alpha: float) -> dict[str, Any]:
    """The geometric mean of one positive value a launch, with Student's t interval of the logarithms.
    Values of 0, which have none, make it an arithmetic mean without an interval.
    """
    if not values or min(values) <= 0:
        return {"mean": _mean(values), "low": None, "high": None}
    logs = np.log(values)
    mean = math.exp(float(logs.mean()))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    low, high = t_interval(logs, alpha)
    return {"mean": mean, "low": math.exp(float(low)), "high": math.exp(float(high))}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
