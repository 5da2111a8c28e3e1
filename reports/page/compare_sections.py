"""The part of a report that only a comparison has: who was faster, was it fair, what else did it
cost; and pairs of our cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reports import text
from reports.analysis.compare import RULE_WORDS, against_engines, among_ours, throughput_rows
from reports.page.document import Column, Section, Table
from reports.statistics.metrics import LATENCIES

Analysis = Mapping[str, Any]
LINES = Path(__file__).resolve().parents[1] / "published" / "code-lines" / "lines.json"
NOT_COMPARED = (
    "Not compared, and nothing here speaks of it: serving over a network and streaming, text in and out (token ids only), "
    "multi-modal models, quantization, speculative decoding, LoRA, structured output, other models than this one, several "
    "machines, requests that arrive over time, and every version but those named."
)
WORK_TIME = "Timed work: how long a launch took for the workload, medians over launches; the shorter, the easier to disturb."
TWIN = (
    " A/A twin: the ratio of the baseline's second arm, the same cell run once more; where it or its interval lies far from the "
    "first, that much is chance."
)
_GIB = 2**30


def compare_sections(analysis: Analysis) -> Iterator[Section]:
    """Nothing for a study that compares with no other engine."""
    entries = against_engines(analysis)
    if entries:
        lead = [
            "Output tokens per second of our cell over those of the other engine's, in the same block, steady state: each launch "
            "is a fresh process, started and warmed up before anything is timed. Each throughput stands beside its bound below. "
            f"{_latencies(analysis, entries)}",
            WORK_TIME + TWIN * any(entry["twins"] for entry in entries),
            NOT_COMPARED,
        ]
        tables = [_verdicts(analysis, entries), _durations(analysis, entries)]
        yield Section("compared", "Who is faster, on what", lead, None, tables)
        yield _fairness(analysis, entries)
        yield _costs(analysis)


def _latencies(analysis: Analysis, entries: Sequence[Mapping[str, Any]]) -> str:
    """Which cells of the comparisons have their latencies in the report, and of the others, why
    not.
    """
    latencies = {metric.key for metric in LATENCIES}
    recorded = {row["cell"] for row in analysis["rates"] if row["metric"] in latencies and row["n"]}
    compared = dict.fromkeys(entry[side] for side in ("ours", "theirs") for entry in entries)
    if missing := [cell for cell in compared if cell not in recorded]:
        off = all(
            analysis["cells"][cell]["config"].get("request_statistics") is False for cell in missing
        )
        why = " (request statistics were off)" if off else ""
        where = (
            "; those of the others stand under their own heading"
            if len(missing) < len(compared)
            else ""
        )
        return f"Latencies were not recorded of {', '.join(missing)}{why}{where}."
    return "The latencies of both engines stand under their own heading."


def pairs_of_ours(analysis: Analysis) -> Iterator[Section]:
    """What one of our cells adds to another; nothing for a study that names no such pair."""
    entries = among_ours(analysis)
    if entries:
        unfair = [entry for entry in entries if entry["breaches"]]
        lead = [
            "Output tokens per second of one cell over those of another, in the same block: what lies between the two, with an "
            "interval that their ratios to the baseline do not give.",
            WORK_TIME,
            *(
                f"No ratio of {entry['ours']} to {entry['theirs']}: {'; '.join(entry['breaches'])}."
                for entry in unfair
            ),
        ]
        tables = [_verdicts(analysis, entries), _durations(analysis, entries)]
        yield Section("pairs", "What one change adds to another", lead, None, tables)


def _verdicts(analysis: Analysis, entries: Sequence[Mapping[str, Any]]) -> Table:
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
            entry["ours"],
            entry["theirs"],
            text.ratio(effect["ratio"]),
            text.interval(effect["low"], effect["high"]),
            effect["verdict"],
            text.probability(effect["p_holm"]),
            str(effect["n"]),
            *([_twin(entry["twins"].get(effect["workload"]))] if twins else []),
        ]
        for entry, effect in throughput_rows(analysis, entries)
    ]
    return Table("Comparisons", columns, rows, grouped=True)


def _durations(analysis: Analysis, entries: Sequence[Mapping[str, Any]]) -> Table:
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
        [name, *cells, *(text.seconds(took.get((name, cell))) for cell in cells)]
        for name, *cells in pairs
    ]
    return Table("Timed work of a launch", columns, rows)


def _twin(effect: Mapping[str, Any] | None) -> str:
    if effect is None or effect["ratio"] is None:
        return text.ABSENT
    return f"{text.ratio(effect['ratio'])} ({text.interval(effect['low'], effect['high'])})"


def _fairness(analysis: Analysis, entries: Sequence[Mapping[str, Any]]) -> Section:
    rules = [
        [
            entry["name"],
            f"{entry['ours']} / {entry['theirs']}",
            RULE_WORDS[entry["rule"]],
            "; ".join(entry["breaches"]) or "they do",
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
        pair = f"{entry['ours']} against {entry['theirs']}"
        if pair not in seen:
            seen.add(pair)
            columns = [
                Column("setting", "code"),
                Column(entry["ours"], "long"),
                Column(entry["theirs"], "long"),
            ]
            rows = [[key, _value(mine), _value(other)] for key, mine, other in entry["differences"]]
            tables.append(Table(f"Whatever else differs: {pair}", columns, rows, folded=True))
    digest = analysis["hardware"]["model"].get("digest", text.ABSENT)
    lead = [
        f"One checkpoint (digest {digest[:16]}), verified before the first launch and watched until the last; one workload "
        "fingerprint, checked in every launch. Number format and KV-cache bytes are read from what each engine resolved, not "
        "from what it was asked for. Like for like shares the limits and every switch that both have, too. A breach stops the "
        "study.",
    ]
    return Section("fairness", "Was it a fair comparison", lead, None, tables)


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

    def numbers(*titles: str) -> list[Column]:
        return [Column(title, "number") for title in titles]

    launch = [
        [
            row["cell"],
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
            row["cell"],
            text.number(row["requests_per_s"]),
            text.seconds(row["cpu_s_per_token"]),
        ]
        for row in cost["work"]
    ]
    lines, said = _code_lines()
    lead = [
        "Starting: from the start of the process until it takes requests, engine and model loaded; the first launch compiles "
        "what later ones may find compiled. Warm-up: the head of every workload, before the timed work. Memory: the highest of "
        "the whole process tree, shared pages counted in each process. CPU time: user and system, all processes of the engine.",
        said,
    ]
    tables = [
        Table(
            "Starting and memory, medians over launches",
            [
                Column("cell", "code"),
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
                Column("cell", "code"),
                *numbers("requests/s", "CPU time a token"),
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
    return Section("costs", "What else it costs", lead, None, tables)


def _code_lines() -> tuple[list[list[str]], str]:
    """Rows of the table, and a sentence; the count is a record of its own (`python -m reports
    lines`).
    """
    if not LINES.is_file():
        return (
            [],
            "Lines of code have not been counted here: python -m reports lines --model FOLDER --vllm PYTHON does.",
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
        f"Lines of code were counted one way for both engines, in runs on a CPU ({made_at}): what needs a GPU (Triton kernels, "
        "CUDA graphs, cascade attention) is in our whole package alone."
    )
    if theirs := counts.get("vllm"):
        counted = f"{theirs['version']} on a CPU, eager ({theirs.get('made_at', made_at)})"
        said += f" vLLM's count is of version {counted}, whichever version and device are compared here."
    return rows, said


def _gib(value: float | None) -> str:
    return text.ABSENT if not value else f"{value / _GIB:.2f}"
