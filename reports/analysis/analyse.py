"""From records and their plan to the result of a study: one JSON-able dict, the same for the same
input.

`analyse` counts launches (counting.py), takes the metrics of each (metrics.py), and estimates
effects as ratios to the baseline of the same block (intervals.py). Families of effects that are
judged together (Holm): all treatments on one metric, all A/A arms on one metric, all ratios to
references, all interactions, and each kind of factor contrast. The A/A arm has a family of its own
because it is a control: it should raise the alarm as easily as a single test does. A study may ask
for moderated variances, and for a family of treatments for each of its questions (noise.py).
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from experiments import workloads
from experiments.records.cell_names import shown_names
from experiments.records.types import Plan, Record
from reports.analysis.answer import answer
from reports.analysis.cells import by_cell
from reports.analysis.compare import compared, costs, paired
from reports.analysis.counting import Counted, count
from reports.analysis.gate_and_launches import equivalence, hardware, run_order, toggles
from reports.analysis.gate_lines import Gate
from reports.analysis.noise import (
    Priors,
    described,
    precision,
    priors,
    question,
    rounding,
    scale_of,
)
from reports.analysis.types import Analysis, Company, Counts, Effect, LinearEffect, Rate
from reports.analysis.under_load import energies, transients, under_load
from reports.analysis.unjudged import measured
from reports.statistics import ceiling
from reports.statistics.contrasts import Contrast, Lattice, Toggle, evaluate
from reports.statistics.intervals import Judged, Rule, estimate, judge
from reports.statistics.linear_model import fit
from reports.statistics.metrics import (
    EVERY,
    THROUGHPUT,
    Metric,
    harmonic_mean,
    metrics_of,
    of_launch,
)
from reports.statistics.moderation import Prior
from reports.statistics.residuals import diagnose
from reports.statistics.under_load import Transient

ANALYSIS_SCHEMA = 1
ALL_WORKLOADS = (
    # the pseudo-workload of a launch's total: all its output tokens over all its serving time
    "all workloads"
)

# What the verdict on an interaction is called.
PAIR_VERDICTS = {
    "faster": "help each other",
    "slower": "stand in each other's way",
    "equivalent": "independent",
    "inconclusive": "inconclusive",
}

# {metric: {workload: {cell: {block: value}}}}
Values = dict[str, dict[str, dict[str, dict[int, float]]]]


def analyse(records: Sequence[Record], plan: Plan, notes: Sequence[str] = ()) -> Analysis:
    """Everything a report shows. `notes`: what was noticed while reading the records
    (experiments/records/reading.py).

    Raises ValueError for a plan without exactly one baseline, and for a workload that this version
    draws differently.
    """
    study = plan["study"]
    metric = _metric(study)
    lattice = Lattice(plan["cells"], _off(study), study.get("design", {}).get("generators"))
    drawn = _drawn(plan)
    gate = Gate(records, plan)
    counted = count(records, plan, gate)
    starts = transients(counted, plan)
    rule = Rule(
        alpha=study.get("alpha", 0.05),
        smallest_effect=study["smallest_effect"],
        seed=plan["plan_hash"],
        rounding=rounding(plan, starts) if "load" in study else {},
    )
    values = _values(counted, drawn, plan, starts)
    noise = priors(values, plan)
    effects = _effects(values, lattice, plan, rule, noise)

    result: Analysis = {
        "schema": ANALYSIS_SCHEMA,
        "study": dict(study),
        "plan_hash": plan["plan_hash"],
        "metric": {
            "key": metric.key,
            "label": metric.label,
            "unit": metric.unit,
            "better": metric.better,
        },
        "rule": {
            "alpha": rule.alpha,
            "confidence": 1 - rule.alpha,
            "smallest_effect": rule.smallest_effect,
            "band": list(rule.band),
            "power": rule.power,
        },
        "statistics": described(plan, noise),
        "precision": precision([e for e in effects if e["workload"] in drawn], metric.key),
        "baseline": lattice.baseline,
        "cells": {name: dict(cell) for name, cell in plan["cells"].items()},
        "shown": shown_names(plan, counted.launches),
        "workloads": {name: dict(entry) for name, entry in plan["workloads"].items()},
        "waves": {name: [len(wave) for wave in work["waves"]] for name, work in drawn.items()},
        "counts": _counts(plan, counted),
        "rates": _rates(values, plan),
        "effects": effects,
        "references": _references(values, lattice, plan, rule, metric, noise),
        "comparisons": compared(values, counted.launches, plan, rule, noise),
        "costs": costs(counted.launches, plan),
        "factors": _factors(values, lattice, rule, metric, noise),
        "interactions": _interactions(values, lattice, rule, metric, noise),
        "combinations": _combinations(values, lattice, rule, metric, noise),
        "residuals": {
            workload: found
            for workload in drawn
            if (found := diagnose(values[metric.key].get(workload, {}))) is not None
        },
        "linear_model": _linear_model(values, lattice, rule, metric),
        "ceiling": _ceilings(values, plan, drawn),
        "gate": equivalence(gate, counted, plan),
        "toggles": toggles(counted, plan),
        "not_applicable": [dict(entry) for entry in plan.get("not_applicable", [])],
        "excluded": counted.excluded,
        "unjudged": measured(records, plan, gate, counted),
        "checks": {
            "made": dict(sorted(counted.checks_made.items())),
            "failed": counted.checks_failed,
        },
        "order": run_order(counted, values[metric.key]),
        "hardware": hardware(counted, plan),
        "notes": list(notes),
        "days": sorted(
            {record["started_at"][:10] for record in records if record["kind"] == "launch"}
        ),
    }
    if (load := under_load(counted, plan, starts)) is not None:
        result["load"] = load
    if energy := energies(counted, plan):
        result["energy"] = energy
    result["answer"] = answer(result)
    result["by_cell"] = by_cell(result)
    return result


def ratios(records: Sequence[Record], plan: Plan, ours: str, theirs: str) -> list[Effect]:
    """Throughput of one cell over that of another, workload by workload, paired within blocks as
    `effects` are.

    For a question that the study did not ask before it ran: no verdicts. Raises ValueError for a
    cell that the plan does not have.
    """
    for cell in (ours, theirs):
        if cell not in plan["cells"]:
            raise ValueError(
                f"{cell!r} is no cell of this study; it has {', '.join(plan['cells'])}"
            )
    study = plan["study"]
    counted = count(records, plan, Gate(records, plan))
    starts = transients(counted, plan)
    rule = Rule(
        alpha=study.get("alpha", 0.05),
        smallest_effect=study["smallest_effect"],
        seed=plan["plan_hash"],
        rounding=rounding(plan, starts) if "load" in study else {},
    )
    drawn = _drawn(plan)
    values = _values(counted, drawn, plan, starts)
    noise = priors(values, plan)
    return [
        paired(values, THROUGHPUT.key, workload, ours, theirs, rule, noise)
        for workload in values[THROUGHPUT.key]
    ]


def _drawn(plan: Plan) -> dict[str, Mapping[str, Any]]:
    """The workloads of a plan. Raises ValueError for one that this version draws differently."""
    return {name: _rebuild(name, json.dumps(entry)) for name, entry in plan["workloads"].items()}


@lru_cache(maxsize=16)
def _rebuild(name: str, entry: str) -> Mapping[str, Any]:
    """Studies share workloads, and a library of them would draw the same one again and again."""
    return workloads.rebuild(name, json.loads(entry))


def _metric(study: Mapping[str, Any]) -> Metric:
    key = study.get("metric", THROUGHPUT.key)
    if key not in EVERY:
        raise ValueError(
            f"study {study.get('name')!r}: metric {key!r} is unknown; known: {', '.join(EVERY)}"
        )
    return EVERY[key]


def _off(study: Mapping[str, Any]) -> dict[str, Any] | None:
    """The level at which each factor is off, where the plan says so (plans of older versions may
    not).
    """
    return (
        {name: factor["baseline"] for name, factor in study["factors"].items()}
        if "factors" in study
        else None
    )


def _values(
    counted: Counted,
    drawn: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    starts: Mapping[str, Transient],
) -> Values:
    """Every metric of every counted launch, and where there are several workloads, their throughput
    together.
    """
    values: Values = {key: {} for key in metrics_of(plan)}
    rules = plan["study"].get("load")
    lengths = {
        name: [request["max_tokens"] for wave in work["waves"] for request in wave]
        for name, work in drawn.items()
    }
    for record in counted.launches:
        for name in drawn:
            cut = starts[name].cut if name in starts else 0
            found = of_launch(record["workloads"][name], lengths[name], rules, cut)
            for key, value in found.items():
                values[key].setdefault(name, {}).setdefault(record["cell"], {})[record["block"]] = (
                    value
                )
        if len(drawn) > 1:
            parts = [record["workloads"][name] for name in drawn]
            rate = sum(part["output_tokens"] for part in parts) / sum(
                part["duration_s"] for part in parts
            )
            values[THROUGHPUT.key].setdefault(ALL_WORKLOADS, {}).setdefault(record["cell"], {})[
                record["block"]
            ] = rate
    return values


def _counts(plan: Plan, counted: Counted) -> Counts:
    cells = set(plan["cells"])
    by_block: dict[int, set[str]] = {}
    ran: dict[int, set[str]] = {}
    for record in counted.launches:
        by_block.setdefault(record["block"], set()).add(record["cell"])
    for row in (*counted.launches, *(row for row in counted.excluded if row["status"] == "ok")):
        ran.setdefault(row["block"], set()).add(row["cell"])
    return {
        "planned_launches": len(plan["launches"]),
        "planned_blocks": len({launch["block"] for launch in plan["launches"]}),
        "counted_launches": len(counted.launches),
        "complete_blocks": sum(present == cells for present in by_block.values()),
        # to the end, whether they count or not
        "run_blocks": sum(present == cells for present in ran.values()),
        "excluded_launches": len(counted.excluded),
        "duplicates": counted.duplicates,
    }


def _rates(values: Values, plan: Plan) -> list[Rate]:
    """Each metric of each cell over its counted blocks: throughput by harmonic mean, times by
    arithmetic mean.
    """
    rows: list[Rate] = []
    for key, metric in metrics_of(plan).items():
        for workload in _workloads(values, plan, key):
            for cell in plan["cells"]:
                by_block = values[key].get(workload, {}).get(cell, {})
                samples = list(by_block.values())
                mean = None
                if samples:
                    mean = (
                        harmonic_mean(samples)
                        if metric.better == "higher"
                        else sum(samples) / len(samples)
                    )
                rows.append(
                    {
                        "metric": key,
                        "workload": workload,
                        "cell": cell,
                        "mean": mean,
                        "n": len(samples),
                        "min": min(samples, default=None),
                        "max": max(samples, default=None),
                    }
                )
    return rows


def _workloads(values: Values, plan: Plan, key: str) -> list[str]:
    combined = [ALL_WORKLOADS] if key == THROUGHPUT.key and len(plan["workloads"]) > 1 else []
    return [*plan["workloads"], *combined]


def _log_ratios(
    by_cell: Mapping[str, Mapping[int, float]], cell: str, other: str
) -> dict[int, float]:
    """{block: log(cell / other)} over the blocks in which both were counted."""
    above, below = by_cell.get(cell, {}), by_cell.get(other, {})
    return {
        block: math.log(above[block] / below[block])
        for block in sorted(above.keys() & below.keys())
    }


def _effects(
    values: Values, lattice: Lattice, plan: Plan, rule: Rule, noise: Priors
) -> list[Effect]:
    """Every cell but the references, on every metric and workload, as a ratio to the baseline of
    the same block.
    """
    effects: list[Effect] = []
    for key, metric in metrics_of(plan).items():
        families: dict[tuple[str, str, bool], list[Effect]] = {}
        for workload in _workloads(values, plan, key):
            for cell, entry in plan["cells"].items():
                if entry["role"] in ("baseline", "reference"):
                    continue
                log_ratios = _log_ratios(values[key].get(workload, {}), cell, lattice.baseline)
                effect: Effect = {
                    "metric": key,
                    "workload": workload,
                    "cell": cell,
                    "role": entry["role"],
                    **estimate(
                        log_ratios,
                        rule,
                        f"{key}/{workload}/{cell}",
                        noise.get((key, workload, lattice.baseline)),
                        least_sd=rule.rounding.get((key, workload), 0.0),
                    ),
                }
                group = "aa" if entry["role"] == "aa" else "treatment"
                asked = "" if group == "aa" else question(cell, plan, lattice)
                # All workloads together is a summary of the others, not one more test: it has a
                # family of its own. But in the A/A arm any difference at all is an alarm, and all
                # of them are one family.
                effect["question"] = asked
                families.setdefault(
                    (group, asked, group != "aa" and workload == ALL_WORKLOADS), []
                ).append(effect)
                effects.append(effect)
        for family in families.values():
            judge(family, rule, metric.better)
    return effects


def _references(
    values: Values,
    lattice: Lattice,
    plan: Plan,
    rule: Rule,
    metric: Metric,
    noise: Priors,
) -> list[Effect]:
    """The baseline and the point with everything on, as ratios to each reference of the same block."""
    ours = [
        lattice.baseline,
        *(name for name, cell in plan["cells"].items() if cell["role"] == "all"),
    ]
    family: list[Effect] = []
    for workload in _workloads(values, plan, metric.key):
        for reference in (
            name for name, cell in plan["cells"].items() if cell["role"] == "reference"
        ):
            for cell in ours:
                log_ratios = _log_ratios(values[metric.key].get(workload, {}), cell, reference)
                family.append(
                    {
                        "metric": metric.key,
                        "workload": workload,
                        "cell": cell,
                        "reference": reference,
                        **estimate(
                            log_ratios,
                            rule,
                            f"{metric.key}/{workload}/{cell}/{reference}",
                            noise.get((metric.key, workload, reference)),
                            least_sd=rule.rounding.get((metric.key, workload), 0.0),
                        ),
                    }
                )
    judge(family, rule, metric.better)
    return family


def _contrast_effect(
    values: Values,
    contrast: Contrast,
    workload: str,
    rule: Rule,
    metric: Metric,
    name: str,
    prior: Prior | None,
) -> Effect:
    by_cell = values[metric.key].get(workload, {})
    log_values = {
        cell: {block: math.log(value) for block, value in blocks.items()}
        for cell, blocks in by_cell.items()
    }
    return {
        "metric": metric.key,
        "workload": workload,
        **estimate(
            evaluate(contrast, log_values),
            rule,
            f"{metric.key}/{workload}/{name}",
            prior,
            scale_of(contrast),
            rule.rounding.get((metric.key, workload), 0.0) * math.sqrt(scale_of(contrast)),
        ),
    }


def _factors(
    values: Values, lattice: Lattice, rule: Rule, metric: Metric, noise: Priors
) -> list[Effect]:
    """The effect of each factor: alone, added last (`left out`), on average, and by Shapley's
    share, as far as the design can tell.
    """
    effects: list[Effect] = []
    everything = lattice.cell.get(lattice.everything or frozenset(), lattice.baseline)
    for kind, contrasts in lattice.factor_contrasts().items():
        family: list[Effect] = []
        shared = everything if kind == "left out" else lattice.baseline
        for workload in sorted(set(values[metric.key]) - {ALL_WORKLOADS}):
            for (factor, level), contrast in contrasts.items():
                effect = _contrast_effect(
                    values,
                    contrast,
                    workload,
                    rule,
                    metric,
                    f"{kind}/{factor}={level}",
                    noise.get((metric.key, workload, shared)),
                )
                row: Effect = {"kind": kind, "factor": factor, "level": level, **effect}
                if kind in ("alone", "left out"):  # one cell over another
                    for cell, weight in contrast.items():
                        if weight > 0:
                            row["on"] = cell
                        else:
                            row["off"] = cell
                if kind == "left out":
                    row = {**row, **_company(lattice, (factor, level))}
                family.append(row)
        judge(family, rule, metric.better)
        effects += family
    return effects


def _company(lattice: Lattice, toggle: Toggle) -> Company:
    """How both sides of a comparison with everything on differ from it (`without`, `beside`), and
    whether the toggle is part of everything on. Empty if it is and nothing else differs.
    """
    everything, background = (
        lattice.everything or frozenset(),
        lattice.company(toggle) or frozenset(),
    )
    said: Company = {}
    if without := everything - {toggle} - background:
        said["without"] = sorted(map(_label, without))
    if beside := background - everything:
        said["beside"] = sorted(map(_label, beside))
    if toggle not in everything:
        said["part_of_all"] = False
    return said


def _interactions(
    values: Values, lattice: Lattice, rule: Rule, metric: Metric, noise: Priors
) -> list[Effect]:
    """Two-way interactions: how many times more (or less) a pair buys than the product of what each
    buys.
    """
    family: list[Effect] = []
    for workload in sorted(set(values[metric.key]) - {ALL_WORKLOADS}):
        for (first, second), contrast in lattice.interactions().items():
            effect = _contrast_effect(
                values,
                contrast,
                workload,
                rule,
                metric,
                f"{_label(first)}*{_label(second)}",
                noise.get((metric.key, workload, lattice.baseline)),
            )
            family.append({"first": _label(first), "second": _label(second), **effect})
    judge(family, rule, metric.better)
    for effect in family:
        _as_pair(effect)
    return family


def _combinations(
    values: Values, lattice: Lattice, rule: Rule, metric: Metric, noise: Priors
) -> list[Effect]:
    """How many times more (or less) everything on buys than the product of its parts, for each
    workload; [] in a study that did not try each of them alone.
    """
    contrast = lattice.combination()
    workloads = sorted(set(values[metric.key]) - {ALL_WORKLOADS}) if contrast else ()
    family = [
        _contrast_effect(
            values,
            contrast,
            workload,
            rule,
            metric,
            "combination",
            noise.get((metric.key, workload, lattice.baseline)),
        )
        for workload in workloads
    ]
    judge(family, rule, metric.better)
    for effect in family:
        _as_pair(effect)
    return family


def _linear_model(
    values: Values, lattice: Lattice, rule: Rule, metric: Metric
) -> list[LinearEffect]:
    """Main effects and pairs of a two-level factorial, gathered by what a fraction cannot tell
    apart; [] of any other.
    """
    runs = lattice.factorial_cells()
    family: list[LinearEffect] = []
    for workload in sorted(set(values[metric.key]) - {ALL_WORKLOADS}) if runs else ():
        by_cell = values[metric.key][workload]
        log_values = {
            cell: {b: math.log(v) for b, v in by_cell.get(cell, {}).items()} for cell in runs
        }
        for effect in fit(log_values, runs, lattice.factors, lattice.generators, rule):
            family.append({"metric": metric.key, "workload": workload, **effect})
    judge(family, rule, metric.better)
    for effect in family:
        if effect["order"] == 2:
            _as_pair(effect)
    return family


def _as_pair(effect: Judged) -> None:
    """The verdict on an interaction in its own words."""
    effect["verdict"] = PAIR_VERDICTS[effect["verdict"]]
    effect["leans"] = PAIR_VERDICTS[leans] if (leans := effect["leans"]) else None


def _label(toggle: Toggle) -> str:
    return f"{toggle[0]}={toggle[1]}"


def _ceilings(
    values: Values, plan: Plan, drawn: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The roofline bound of each workload, and the share of it that each cell reaches.

    A cell on several GPUs has that many times the bandwidth; on a CPU all ranks and replicas share
    one memory.
    """
    profile, shape = plan["profile"], ceiling.ModelShape.of_plan(plan["model"])
    rows = []
    for name, workload in drawn.items():
        work = ceiling.Work.of_waves(
            [
                [(request["prompt_token_ids"], request["max_tokens"]) for request in wave]
                for wave in workload["waves"]
            ]
        )
        for cell, entry in plan["cells"].items():
            config = entry["config"]  # of another engine, the degree is a setting
            asked = {**config, **(config.get("optimizations") or {}), **entry["levels"]}
            replicas = int(asked.get("data_parallel_size", 1))
            ranks = int(asked.get("tensor_parallel_size", 1)) * replicas
            devices = 1 if profile["device"] == "cpu" else ranks
            # of each rank; an engine without this setting (hf) may use more
            limit = asked.get("kv_cache_memory_bytes")
            at_a_time = asked.get("max_num_seqs")
            bound = ceiling.bound(
                work,
                shape,
                profile["bandwidth_bytes_per_s"],
                profile["peak_flops"],
                limit and limit * ranks,
                devices,
                at_a_time and at_a_time * replicas,
            )
            rates = list(values[THROUGHPUT.key].get(name, {}).get(cell, {}).values())
            rate = harmonic_mean(rates) if rates else None
            rows.append(
                {
                    "workload": name,
                    "cell": cell,
                    "devices": devices,
                    "tokens_per_s": rate,
                    "share": rate / bound.tokens_per_s if rate else None,
                    "bound": bound.as_dict(),
                }
            )
    return rows
