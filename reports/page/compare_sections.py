"""The sections that only a comparison of engines has: statistics, fairness, costs; and pairs of our
own configurations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reports import text
from reports.analysis.compare import RULE_WORDS, against_engines, among_ours, throughput_rows
from reports.analysis.types import Analysis, Comparison, Effect
from reports.page.document import Column, Section, Table
from reports.page.overview import name, numbers
from reports.statistics.metrics import LATENCIES

LINES = Path(__file__).resolve().parents[1] / "published" / "code-lines" / "lines.json"
NOT_COMPARED = (
    "Not compared: serving over a network and streaming, text input and output (both engines get and return token ids), "
    "multi-modal models, quantization, speculative decoding, LoRA, structured output, other models, several "
    "machines, requests that arrive over time, and any version other than those named here."
)
WORK_TIME = "Timed work: how long a launch took for the workload, median over launches; the shorter, the easier to disturb."
TWIN = (
    " A/A twin: the ratio with our configuration's second run in its place; where it or its interval lies far from the "
    "first, that much is noise."
)
_GIB = 2**30


def compare_sections(analysis: Analysis) -> Iterator[Section]:
    """The sections of a comparison; none if the study has no other engine."""
    entries = against_engines(analysis)
    if entries:
        lead = [
            "Output tokens per second of our configuration over those of the other engine, in the same block, steady state: "
            "each launch is a fresh process, loaded and warmed up before anything is timed. "
            f"{_latencies(analysis, entries)}",
            WORK_TIME + TWIN * any(entry["twins"] for entry in entries),
            NOT_COMPARED,
        ]
        tables = [_verdicts(analysis, entries), _durations(analysis, entries)]
        gist = "intervals, p-values, what was not compared"
        yield Section("compared", "Comparison: statistics", lead, None, tables, gist=gist)
        yield _fairness(analysis, entries)
        yield _costs(analysis)


def _latencies(analysis: Analysis, entries: Sequence[Comparison]) -> str:
    """Which configurations of the comparisons have latencies in the report, and why the others have
    none.
    """
    latencies = {metric.key for metric in LATENCIES}
    recorded = {row["cell"] for row in analysis["rates"] if row["metric"] in latencies and row["n"]}
    compared = dict.fromkeys(entry[side] for side in ("ours", "theirs") for entry in entries)
    if missing := [cell for cell in compared if cell not in recorded]:
        off = all(
            analysis["cells"][cell]["config"].get("request_statistics") is False for cell in missing
        )
        why = " (request statistics were off)" if off else ""
        where = "; those of the others are in the section on latency"
        listed = ", ".join(name(analysis, cell) for cell in missing)
        return f"Latencies were not recorded for {listed}{why}{where * (len(missing) < len(compared))}."
    return "The latencies of both engines are in the section on latency."


def pairs_of_ours(analysis: Analysis) -> Iterator[Section]:
    """What one of our configurations adds to another; none if the study names no such pair."""
    entries = among_ours(analysis)
    if entries:
        unfair = [entry for entry in entries if entry["breaches"]]
        lead = [
            "Output tokens per second of one configuration over those of another, in the same block, with an interval of its "
            f"own, which their ratios to {name(analysis, analysis['baseline'])} do not give.",
            WORK_TIME,
            *(
                f"No ratio of {name(analysis, entry['ours'])} to {name(analysis, entry['theirs'])}: {'; '.join(entry['breaches'])}."
                for entry in unfair
            ),
        ]
        tables = [_verdicts(analysis, entries), _durations(analysis, entries)]
        yield Section("pairs", "What one change adds to another", lead, None, tables)


def _verdicts(analysis: Analysis, entries: Sequence[Comparison]) -> Table:
    code, number = (lambda title: Column(title, "code")), (lambda title: Column(title, "number"))
    confidence = text.percent(analysis["rule"]["confidence"], 0)
    twins = any(entry["twins"] for entry in entries)
    columns = [
        code("workload"),
        Column("comparison"),
        code("ours"),
        code("against"),
        number("ratio"),
        number(f"{confidence} interval"),
        Column("verdict", "verdict"),
        number("p (Holm)"),
        number("blocks"),
        *([number("A/A twin")] if twins else []),
    ]
    rows = [
        [
            effect["workload"],
            entry["name"],
            name(analysis, entry["ours"]),
            _against(analysis, entry["theirs"]),
            text.ratio(effect["ratio"]),
            text.interval(effect["low"], effect["high"]),
            text.verdict(effect),
            text.probability(effect["p_holm"]),
            str(effect["n"]),
            *([_twin(entry["twins"].get(effect["workload"]))] if twins else []),
        ]
        for entry, effect in throughput_rows(analysis, entries)
    ]
    return Table("Comparisons", columns, rows, grouped=True)


def _durations(analysis: Analysis, entries: Sequence[Comparison]) -> Table:
    took = {(row["workload"], row["cell"]): row["duration_s"] for row in analysis["costs"]["work"]}
    shown = throughput_rows(analysis, entries)
    pairs = dict.fromkeys(
        (effect["workload"], entry["ours"], entry["theirs"]) for entry, effect in shown
    )
    columns = [
        Column("workload", "code"),
        Column("ours", "code"),
        Column("against", "code"),
        Column("ours took", "number"),
        Column("the other took", "number"),
    ]
    rows = [
        [
            workload,
            name(analysis, ours),
            _against(analysis, theirs),
            *(text.seconds(took.get((workload, cell))) for cell in (ours, theirs)),
        ]
        for workload, ours, theirs in pairs
    ]
    return Table("Timed work of a launch", columns, rows)


def _against(analysis: Analysis, cell: str) -> str:
    """The other side of a pair; the heading says already that it is a reference."""
    return name(analysis, cell).removeprefix("reference: ")


def _twin(effect: Effect | None) -> str:
    if effect is None or effect["ratio"] is None:
        return text.ABSENT
    return f"{text.ratio(effect['ratio'])} ({text.interval(effect['low'], effect['high'])})"


def _fairness(analysis: Analysis, entries: Sequence[Comparison]) -> Section:
    rules = [
        [
            entry["name"],
            f"{name(analysis, entry['ours'])} / {_against(analysis, entry['theirs'])}",
            RULE_WORDS[entry["rule"]],
            "; ".join(entry["breaches"]) or "shared",
            "fail" if entry["breaches"] else "pass",
        ]
        for entry in entries
    ]
    tables = [
        Table(
            "The rules",
            [
                Column("comparison"),
                Column("pair", "code"),
                Column("must share"),
                Column("found"),
                Column("fair", "verdict"),
            ],
            rules,
        )
    ]
    seen = set()
    for entry in entries:
        sides = name(analysis, entry["ours"]), _against(analysis, entry["theirs"])
        pair = " against ".join(sides)
        if pair not in seen:
            seen.add(pair)
            columns = [
                Column("setting", "code"),
                Column(sides[0], "long"),
                Column(sides[1], "long"),
            ]
            rows = [
                [key, _value(mine), _value(other)]
                for key, mine, other in entry["differences"]
                if mine is not None and other is not None
            ]
            tables.append(Table(f"All other differences: {pair}", columns, rows, folded=True))
            rows = [
                [key, _value(mine), _value(other)]
                for key, mine, other in entry["differences"]
                if mine is None or other is None
            ]
            tables.append(
                Table(f"Settings that one side alone recorded: {pair}", columns, rows, folded=True)
            )
    digest = analysis["hardware"]["model"].get("digest", text.ABSENT)
    packages = [
        f"{key.removeprefix('packages.')} {', '.join(values)}"
        for key, values in analysis["hardware"]["varying"].items()
        if key in ("packages.torch", "packages.transformers")
    ]
    lead = [
        f"Both engines load one checkpoint (digest {digest[:16]}), verified before the first launch and watched until the last, "
        "and serve the same requests (fingerprint checked in every launch). Number format and KV-cache size are read from what "
        "each engine resolved, not from what it was asked for. Like-for-like comparisons also share the limits and every switch "
        "that both engines have. A breach stops the study.",
        *(
            [f"Each engine runs with the packages that it pins: {'; '.join(packages)}."]
            if packages
            else []
        ),
    ]
    gist = "no" if any(entry["breaches"] for entry in entries) else "yes"
    return Section("fairness", "Was the comparison fair?", lead, None, tables, gist=gist)


def _value(value: Any) -> str:
    return (
        "not recorded"
        if value is None
        else json.dumps(value)
        if isinstance(value, (list, dict, bool))
        else str(value)
    )


def _costs(analysis: Analysis) -> Section:
    cost = analysis["costs"]

    launch = [
        [
            name(analysis, row["cell"]),
            text.seconds(row["first_load_s"]),
            text.seconds(row["load_s"]),
            text.seconds(row["warm_up_s"]),
            _gib(row["host_bytes"]),
            _gib(row["device_bytes"]),
            str(row["n"]),
        ]
        for row in cost["launch"]
    ]
    work = [
        [
            row["workload"],
            name(analysis, row["cell"]),
            text.number(row["requests_per_s"]),
            text.seconds(row["cpu_s_per_token"]),
        ]
        for row in cost["work"]
    ]
    lines, said = _code_lines()
    lead = [
        "Start: from the start of the process until it takes requests, with engine and model loaded; the first launch compiles "
        "what later ones find compiled. Warm-up: the beginning of every workload, before the timed work. Memory: the peak of "
        "the whole process tree, shared pages counted in each process. CPU time: user and system, all processes of the engine.",
        said,
    ]
    tables = [
        Table(
            "Start and memory, medians over launches",
            [
                Column("configuration", "code"),
                *numbers(
                    "first start", "later starts", "warm-up", "host, GiB", "GPU, GiB", "launches"
                ),
            ],
            launch,
        ),
        Table(
            "Requests and CPU time, by workload",
            [
                Column("workload", "code"),
                Column("configuration", "code"),
                *numbers("requests/s", "CPU time per token"),
            ],
            work,
            grouped=True,
        ),
        Table(
            "Lines of code, without blanks, comments, docstrings and tests",
            [Column("engine"), Column("version"), Column("counted"), *numbers("files", "lines")],
            lines,
        ),
    ]
    return Section("costs", "Start, memory, CPU time, lines of code", lead, None, tables)


def _code_lines() -> tuple[list[list[str]], str]:
    """Rows of the table, and what to know about them. The count is a record of its own, made by
    `python -m reports lines`.
    """
    if not LINES.is_file():
        return (
            [],
            "Lines of code have not been counted; python -m reports lines --model FOLDER --vllm PYTHON counts them.",
        )
    counts = json.loads(LINES.read_text(encoding="utf-8"))
    words = {
        "core": "core: what a baseline run loads, on a CPU",
        "everything_on": "loaded with everything on, on a CPU",
        "loaded": "loaded by the same job, on a CPU",
        "package": "whole package",
    }
    rows = [
        [
            engine,
            str(counts[engine].get("version") or text.ABSENT),
            says,
            text.number(counts[engine][key]["files"]),
            text.number(counts[engine][key]["lines"]),
        ]
        for engine in ("nanovllm", "vllm")
        if engine in counts
        for key, says in words.items()
        if key in counts[engine]
    ]
    made_at = counts.get("made_at", "no date")
    said = (
        f"Lines of code were counted in the same way for both engines, in runs on a CPU ({made_at}): what needs a GPU (Triton "
        "kernels, CUDA graphs, cascade attention) is only in the count of our whole package."
    )
    if theirs := counts.get("vllm"):
        counted = f"{theirs['version']} on a CPU, eager ({theirs.get('made_at', made_at)})"
        said += f" vLLM's count is of version {counted}, whichever version and device are compared here."
    return rows, said


def _gib(value: float | None) -> str:
    return text.ABSENT if not value else f"{value / _GIB:.2f}"
