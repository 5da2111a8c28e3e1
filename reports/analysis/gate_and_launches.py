"""What a report says besides effects: the gate, the toggles, the order of the launches, the
machine.

These are tables taken from the records as they stand; nothing here is estimated.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.records.types import Plan
from reports.analysis.counting import Counted
from reports.analysis.gate_lines import Gate
from reports.analysis.types import Analysis
from reports.text import count_of

# The telemetry series drawn under the run order: the first of each group that was recorded.
TELEMETRY_SERIES = (("gpu0_sm_mhz", "cpu_mhz"), ("gpu0_celsius", "cpu_busy"))


def equivalence(gate: Gate, counted: Counted, plan: Plan) -> dict[str, Any]:
    """One row for each workload and digest that the gate looked at, with the cells and the number of
    counted launches that produced these tokens.

    same_tokens: {workload: {"launches", "same", "others"}}: how many launches count, how many of them
    generated the tokens of the baseline (None where none of its launches counts), and the cells of
    those that did not.
    """
    made: dict[tuple[str, str], list[str]] = {}
    for record in counted.launches:
        for workload, work in record["workloads"].items():
            made.setdefault((workload, work["tokens_digest"]), []).append(record["cell"])
    rows = [
        {**_gate_row(line), "cells": sorted(set(found)), "launches": len(found)}
        for key, line in sorted(gate.lines.items())
        for found in [made.get(key, [])]
    ]
    controls = [_gate_row(line) for line in gate.negative_controls]
    return {
        "rows": rows,
        "negative_controls": controls,
        "same_tokens": {
            workload: _same_tokens(made, workload, plan) for workload in plan["workloads"]
        },
        "passed": sum(row["status"] == "pass" for row in rows),
        "tokens_checked": sum(row["tokens_checked"] or 0 for row in rows),
    }


def _same_tokens(
    made: Mapping[tuple[str, str], Sequence[str]], workload: str, plan: Plan
) -> dict[str, Any]:
    outputs = [cells for (name, _), cells in made.items() if name == workload]
    base = next(cell for cell, entry in plan["cells"].items() if entry["role"] == "baseline")
    # several only where a launch of the baseline is not repeatable: then the most frequent one
    start = max((cells for cells in outputs if base in cells), key=len, default=None)
    others = {cell for cells in outputs if cells is not start for cell in cells}
    return {
        "launches": sum(map(len, outputs)),
        "same": None if start is None else len(start),
        "others": [cell for cell in plan["cells"] if cell in others],
    }


def same_tokens(analysis: Analysis, workload: str) -> str:
    """How many launches generated exactly the tokens of the baseline, and how many tokens the gate
    judged: "36 of 40 launches gave the tokens of all off, 11,101 judged".
    """
    found = analysis["gate"]["same_tokens"][workload]
    rows = [row for row in analysis["gate"]["rows"] if row["workload"] == workload]
    judged = f"{sum(row['tokens_checked'] or 0 for row in rows):,}"
    if not found["launches"] or found["same"] is None:
        return f"{judged} tokens judged"
    launches = count_of(found["launches"], "launch")
    start = analysis["shown"][analysis["baseline"]]
    return f"{found['same']} of {launches} gave the tokens of {start}, {judged} judged"


def same_output(analysis: Analysis) -> str:
    """Whether the output is the same, in a sentence or two: "Output: equivalent. Every judged token
    passed the gate (28,665 tokens, 29 distinct outputs); identical to all off in 15 of 51 launches, the
    others differ where rounding decides between near-equal tokens."
    """
    gate = analysis["gate"]
    rows, failed = gate["rows"], [row for row in gate["rows"] if row["status"] != "pass"]
    unjudged = sum(
        row["reason"].startswith("the gate did not check") for row in analysis["excluded"]
    )
    rest = (
        f" The outputs of {count_of(unjudged, 'launch')} were not judged, so these do not count."
        if unjudged
        else ""
    )
    if not rows:
        return "Output: not judged. The gate has checked no token, so nothing says that the output is the same."
    outputs = count_of(len(rows), "distinct output")
    if failed:
        where = ", ".join(dict.fromkeys(row["workload"] for row in failed))
        return (
            f"Output: NOT the same. The gate did not pass {len(failed)} of {outputs} ({where}); the launches that "
            f"generated {'it' if len(failed) == 1 else 'them'} are excluded.{rest}"
        )
    judged = f"Every judged token passed the gate ({gate['tokens_checked']:,} tokens, {outputs})"
    found = {
        workload: same
        for workload, same in gate["same_tokens"].items()
        if same["launches"] and same["same"] is not None
    }
    if "price" in analysis:  # the gate holds each to its own definition
        return f"Output: NOT the same in every configuration, by intention. {judged}.{rest}"
    if not found:
        return f"Output: equivalent. {judged}.{rest}"
    start = analysis["shown"][analysis["baseline"]]
    if all(same["same"] == same["launches"] for same in found.values()):
        return f"Output: identical to {start} in every launch. {judged}.{rest}"
    parts: list[str] = []
    for workload, same in found.items():
        launches = f"{same['same']} of {same['launches']}"
        where = f" on {workload}" if len(found) > 1 else ""
        parts.append(f"{launches}{'' if parts else ' launches'}{where}")
    shares = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return (
        f"Output: equivalent. {judged}; identical to {start} in {shares} (with its own), the others "
        f"{_why_others(analysis)}.{rest}"
    )


def _why_others(analysis: Analysis) -> str:
    """Why launches have other tokens than the baseline, though the gate passed them."""
    cells = {cell for same in analysis["gate"]["same_tokens"].values() for cell in same["others"]}
    sampled = {
        cell for row in analysis["gate"]["rows"] if _samples(row) for cell in row["cells"]
    } & cells
    why = "differ where rounding decides between near-equal tokens"
    if not sampled:
        return why
    engines = " and ".join(
        dict.fromkeys(
            analysis["shown"][cell].removeprefix("reference: ").split(" (")[0]
            for cell in analysis["cells"]
            if cell in sampled
        )
    )
    drawn = (
        f"are of other engines ({engines}), which draw other samples"
        if " and " in engines
        else f"are of another engine ({engines}), which draws other samples"
    )
    return drawn if sampled == cells else f"{why}, or {drawn}"


def _samples(row: Mapping[str, Any]) -> bool:
    """Whether these tokens were drawn by another random generator than ours."""
    return bool((row["calibration"] or {}).get("distribution"))


def _gate_row(line: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "workload",
        "tokens_digest",
        "dtype",
        "status",
        "reason",
        "tokens_checked",
        "mismatches",
        "within_bound",
        "max_margin",
        "bound",
        "calibration",
        "first_offender",
    )
    return {name: line.get(name) for name in names}


def toggles(counted: Counted, plan: Plan) -> dict[str, Any]:
    """Did each factor that was on fire, and what could it do? One row for each cell, workload and
    factor that is on.

    engaged, opportunity: the least and the most that a launch counted; opportunity is None where
    being engaged says it all.
    off_checked, off_engaged: how often a factor at its baseline was looked at, and how often it
    fired all the same.
    """
    rows: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    off_checked = off_engaged = 0
    for record in counted.launches:
        for workload in plan["workloads"]:
            for factor, toggle in record["workloads"][workload]["toggles"].items():
                if toggle["level"] != toggle["baseline"]:
                    rows.setdefault((record["cell"], factor, workload), []).append(toggle)
                else:
                    off_checked += 1
                    off_engaged += toggle["engaged"] > 0
    order = list(plan["cells"])
    return {
        "rows": [
            {
                "cell": cell,
                "factor": factor,
                "workload": workload,
                "level": entries[0]["level"],
                "launches": len(entries),
                "engaged": _range([entry["engaged"] for entry in entries]),
                "opportunity": _range(
                    [entry["opportunity"] for entry in entries if entry["opportunity"] is not None]
                ),
            }
            for (cell, factor, workload), entries in sorted(
                rows.items(), key=lambda item: (order.index(item[0][0]), item[0])
            )
        ],
        "off_checked": off_checked,
        "off_engaged": off_engaged,
    }


def _range(values: list[int]) -> list[int] | None:
    return [min(values), max(values)] if values else None


def run_order(
    counted: Counted, values: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> dict[str, Any]:
    """The launches in the order in which they ran, with the mean of their telemetry; values:
    {workload: {cell: {block: value}}}.
    """
    rows = []
    for record in counted.launches:
        own = {
            name: by_cell.get(record["cell"], {}).get(record["block"])
            for name, by_cell in values.items()
        }
        summary = record.get("telemetry", {}).get("summary", {})
        rows.append(
            {
                "launch": record["launch"],
                "block": record["block"],
                "order": record["order"],
                "cell": record["cell"],
                "started_at": record["started_at"],
                "values": own,
                "telemetry": {name: series.get("mean") for name, series in sorted(summary.items())},
                "throttle_reasons": record.get("telemetry", {}).get("throttle_reasons", []),
            }
        )
    recorded = {
        name for row in rows for name, value in row["telemetry"].items() if value is not None
    }
    series = [
        next(name for name in group if name in recorded)
        for group in TELEMETRY_SERIES
        if recorded & set(group)
    ]
    return {"launches": rows, "telemetry_series": series}


def hardware(counted: Counted, plan: Plan) -> dict[str, Any]:
    """Profile, model and provenance of the counted launches. A key that not all launches have with one
    value is varying, with all its values; where engines differ, as "2.15.0 (hf, nanovllm)".
    """
    found = [
        (plan["cells"][record["cell"]]["engine"], dict(flatten(record.get("provenance", {}))))
        for record in counted.launches
    ]
    engines = {engine for engine, _ in found}
    same, varying = {}, {}
    for key in sorted({key for _, own in found for key in own}):
        values: dict[str, set[str]] = {}
        for engine, own in found:
            values.setdefault(own.get(key, "not set"), set()).add(engine)
        if len(values) == 1:
            same[key] = next(iter(values))
        elif len(engines) == 1:
            varying[key] = sorted(values)
        else:
            varying[key] = [
                f"{value} ({', '.join(sorted(having))})" for value, having in sorted(values.items())
            ]
    return {
        "profile": dict(flatten(plan["profile"])),
        "model": dict(flatten(plan["model"])),
        "provenance": same,
        "varying": varying,
        "boots": sorted({record["boot_id"] for record in counted.launches}),
    }


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON -> ("a.b", text) pairs; lists are written on one line, None as an absence."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value)
    else:
        yield prefix, "-" if value is None else str(value)
