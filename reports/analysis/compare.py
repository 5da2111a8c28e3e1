"""What a study's comparisons found: our cell against another engine's or another of ours, pair by
pair, and whether it was fair.

The pairs and their rules are the study's (experiments/study/spec.py, `comparisons`);
experiments/launch/fairness.py says what a rule asks.
A pair that breaks its rule has no ratio: its numbers stand in the other tables, but nothing is
concluded from them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.launch import fairness
from experiments.records.cell_names import engine as engine_name
from experiments.records.types import Plan
from reports.analysis.noise import Priors
from reports.analysis.types import Analysis, Comparison, Effect, WorkloadAnswer
from reports.statistics.intervals import Rule, estimate, judge
from reports.statistics.metrics import THROUGHPUT, metrics_of
from reports.text import (
    comparison,
    count_of,
    interval,
    is_suggestive,
    number,
    percent,
    ratio,
    uncorrected,
)

# {metric: {workload: {cell: {block: value}}}}
Values = Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]
Launches = Sequence[Mapping[str, Any]]


def compared(
    values: Values, launches: Launches, plan: Plan, rule: Rule, noise: Priors
) -> list[Comparison]:
    """One entry for each pair of each comparison, in the study's order; [] for a study without
    comparisons.

    effects: {metric: {workload: Effect}}, ours over theirs, paired within blocks; {} where the pair
    is unfair. All pairs and workloads of a metric are one family.
    twins: {workload: Effect} of the same throughput where ours is the baseline, with the A/A arm in
    its place: the same cell run twice. They are no tests, and have no verdict.
    """
    twin = next((cell for cell, entry in plan["cells"].items() if entry["role"] == "aa"), None)
    entries: list[Comparison] = []
    for name, asked in plan["study"].get("comparisons", {}).items():
        for ours, theirs in fairness.pairs(dict(plan), asked):  # type: ignore[arg-type]
            entries.append(_pair(name, asked["rule"], ours, theirs, launches, plan))
    for key, metric in metrics_of(plan).items():
        family = []
        for entry in entries:
            if not entry["breaches"]:
                found = entry["effects"].setdefault(key, {})
                for workload in plan["workloads"]:
                    found[workload] = paired(
                        values, key, workload, entry["ours"], entry["theirs"], rule, noise
                    )
                    family.append(found[workload])
        judge(family, rule, metric.better)
    for entry in entries:
        if twin and not entry["breaches"] and plan["cells"][entry["ours"]]["role"] == "baseline":
            for workload in plan["workloads"]:
                entry["twins"][workload] = paired(
                    values, THROUGHPUT.key, workload, twin, entry["theirs"], rule, noise
                )
    return entries


def _pair(
    name: str, rule: str, ours: str, theirs: str, launches: Launches, plan: Plan
) -> Comparison:
    mine, other = (
        [record for record in launches if record["cell"] == cell] for cell in (ours, theirs)
    )
    breaches = [
        breach
        for left in mine[-1:]
        for right in other
        for breach in fairness.breaches(dict(plan), rule, dict(left), dict(right))  # type: ignore[arg-type]
    ]
    differences = (
        fairness.differences(mine[-1]["resolved"], other[-1]["resolved"]) if mine and other else []
    )
    return {
        "name": name,
        "rule": rule,
        "ours": ours,
        "theirs": theirs,
        "our_engine": plan["cells"][ours]["engine"],
        "engine": plan["cells"][theirs]["engine"],
        "version": other[-1]["resolved"].get("version") if other else None,
        "breaches": list(dict.fromkeys(breaches)),
        "differences": [list(row) for row in differences],
        "effects": {},
        "twins": {},
    }


def paired(
    values: Values, key: str, workload: str, ours: str, theirs: str, rule: Rule, noise: Priors
) -> Effect:
    """The Effect of one cell over another on a workload, over the blocks that have both; without a
    verdict.
    """
    by_cell = values[key].get(workload, {})
    above, below = by_cell.get(ours, {}), by_cell.get(theirs, {})
    log_ratios = {
        block: math.log(above[block] / below[block])
        for block in sorted(above.keys() & below.keys())
    }
    return {
        "metric": key,
        "workload": workload,
        "cell": ours,
        "reference": theirs,
        **estimate(
            log_ratios,
            rule,
            f"{key}/{workload}/{ours}/{theirs}",
            noise.get((key, workload, theirs)),
            least_sd=rule.rounding.get((key, workload), 0.0),
        ),
    }


def costs(launches: Launches, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The costs of each cell other than serving time: {"launch": one row per cell, "work": one row
    per cell and workload}; medians over launches.

    first_load_s is that of the cell's first counted launch, when nothing was compiled or cached
    yet; load_s of the later ones.
    """
    rows: list[dict[str, Any]] = []
    work: list[dict[str, Any]] = []
    for cell in plan["cells"]:
        own = sorted(
            (r for r in launches if r["cell"] == cell), key=lambda record: record["started_at"]
        )
        if not own:
            continue
        # A forked launch (measurement.preload) has had its imports before it began.
        starts = [
            record["process_start_s"] + (record.get("preloaded_s") or 0.0) + record["load_s"]
            for record in own
        ]
        device = [record["peak_memory_bytes"]["device"] for record in own]
        rows.append(
            {
                "cell": cell,
                "n": len(own),
                "first_load_s": starts[0],
                "load_s": statistics.median(starts[1:] or starts),
                "warm_up_s": statistics.median(record["warm_up_s"] for record in own),
                "host_bytes": statistics.median(
                    record["peak_memory_bytes"]["host"] or 0 for record in own
                ),
                "device_bytes": None if None in device else statistics.median(device),
            }
        )
        for name in plan["workloads"]:
            parts = [record["workloads"][name] for record in own]
            cpu = [
                part["host_cpu_s"] / part["output_tokens"]
                for part in parts
                if part["host_cpu_s"] is not None
            ]
            work.append(
                {
                    "workload": name,
                    "cell": cell,
                    "requests_per_s": len(parts)
                    / sum(part["duration_s"] / part["num_requests"] for part in parts),
                    "cpu_s_per_token": statistics.median(cpu) if cpu else None,
                    "duration_s": statistics.median(part["duration_s"] for part in parts),
                }
            )
    return {
        "launch": rows,
        "work": sorted(work, key=lambda row: list(plan["workloads"]).index(row["workload"])),
    }


def against_engines(analysis: Analysis) -> list[Comparison]:
    """The pairs whose other side is another engine."""
    return [
        entry
        for entry in analysis.get("comparisons") or []
        if entry["engine"] != entry["our_engine"]
    ]


def among_ours(analysis: Analysis) -> list[Comparison]:
    """The pairs of two cells of one engine: what one change adds to another."""
    return [
        entry
        for entry in analysis.get("comparisons") or []
        if entry["engine"] == entry["our_engine"]
    ]


def headline(analysis: Analysis) -> Comparison | None:
    """The pair that the first sentence is about: the study's first against another engine. None for
    a study without one.
    """
    return next(iter(against_engines(analysis)), None)


def by_workload(analysis: Analysis) -> list[WorkloadAnswer]:
    """The answer of a study that compares engines, workload by workload: faster, slower, as fast, or no
    clear winner, and by how much; made from verdicts by fixed rules.
    """
    entry = headline(analysis)
    if entry is None:
        raise ValueError("this study names no comparison with another engine")
    compared_as = comparison(entry["name"], analysis["shown"][entry["ours"]])
    against = f"Against {engine_name(entry['engine'], entry['version'])}, {compared_as}"
    if entry["breaches"]:
        return _no_answer(
            f"{against}: no answer, the comparison was not fair ({entry['breaches'][0]})."
        )
    effects = [effect for effect in entry["effects"][THROUGHPUT.key].values() if effect["n"]]
    if not effects:
        pair = " and ".join(str(analysis["shown"][entry[side]]) for side in ("ours", "theirs"))
        return _no_answer(f"{against}: no answer, no block holds both {pair}.")
    confidence = percent(analysis["rule"]["confidence"], 0)
    parts: list[WorkloadAnswer] = []
    for effect in effects:
        where = f"{against}, {_outcome(entry['our_engine'], effect, analysis)}"
        blocks = count_of(effect["n"], "block")
        if effect["low"] is None:
            found = f"{ratio(effect['ratio'])} in {blocks}, too few for an interval"
        else:
            found = f"{ratio(effect['ratio'])}, {confidence} interval {interval(effect['low'], effect['high'])}, {blocks}"
            if is_suggestive(effect):
                found += f"; suggestive, {uncorrected(effect['tests'])}"
        parts.append(
            {
                "workload": effect["workload"],
                "sentence": f"{where} ({found}){_faster_still(analysis, effect)}.",
                "verdict": effect["verdict"],
            }
        )
    return parts


def _faster_still(analysis: Analysis, effect: Effect) -> str:
    """That another of our configurations has a higher mean throughput than the one compared, by more than
    is too small to matter, as the end of a sentence. No test was made of it.
    """
    ours = effect["cell"]
    rates = {
        row["cell"]: row["mean"]
        for row in analysis["rates"]
        if row["metric"] == THROUGHPUT.key
        and row["workload"] == effect["workload"]
        and row["mean"] is not None
        and analysis["cells"][row["cell"]]["engine"] == analysis["cells"][ours]["engine"]
        and analysis["cells"][row["cell"]]["role"] != "aa"
    }
    best = max(rates, key=lambda cell: rates[cell], default=ours)
    if ours not in rates or rates[best] <= rates[ours] * analysis["rule"]["band"][1]:
        return ""
    shown = analysis["shown"]
    return (
        f"; {shown[ours]} is not the fastest configuration measured: {number(rates[ours])} tok/s, "
        f"{shown[best]} {number(rates[best])}"
    )


def _outcome(ours: str, effect: Effect, analysis: Analysis) -> str:
    """Who is faster on a workload, if the study can tell: "nanovllm is faster on scaled"."""
    where = f"on {effect['workload']}"
    if effect["low"] is None:
        return f"no verdict {where}"
    if is_suggestive(effect):
        return f"{ours} may be {effect['leans']} {where}"
    if effect["verdict"] == "inconclusive":
        return f"there is no clear winner {where}"
    if effect["verdict"] == "equivalent":
        margin = percent(analysis["rule"]["smallest_effect"], 0)
        return f"{ours} is as fast, within {margin}, {where}"
    return f"{ours} is {effect['verdict']} {where}"


def _no_answer(sentence: str) -> list[WorkloadAnswer]:
    return [{"workload": "", "sentence": sentence, "verdict": "inconclusive"}]


RULE_WORDS = {
    "best": "checkpoint, number format, work and KV-cache bytes",
    "like-for-like": "those, the limits, and every switch that both have",
}


def throughput_rows(
    analysis: Analysis, entries: Sequence[Comparison]
) -> Iterator[tuple[Comparison, Effect]]:
    """(pair, effect on throughput), workload by workload, of every fair one of these pairs."""
    for workload in analysis["workloads"]:
        for entry in entries:
            effect = entry["effects"].get(THROUGHPUT.key, {}).get(workload)
            if effect:
                yield entry, effect
