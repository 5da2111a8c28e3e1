"""The content of MLflow runs, as pure functions of records and their analysis, without MLflow.

A study has three kinds of runs, told apart by the tag `role`: one of the study, below it one for
each cell (a configuration), below that one for each of its launches. The numbers of a cell are
those of the report: they are read from `by_cell` in its analysis.json, never computed here.
"""

from __future__ import annotations

import getpass
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from experiments.records import store
from experiments.records.types import (
    GitState,
    JsonObject,
    LaunchRecord,
    Load,
    Plan,
    PlannedWorkload,
    Record,
    ServedWorkload,
)

_SYSTEM = {
    "cpu_busy": ("system/cpu_utilization_percentage", 100.0),
    "cpu_mhz": ("system/cpu_clock_mhz", 1.0),
    "rss_bytes": ("system/process_memory_megabytes", 1e-6),
    "gpu_memory_bytes": ("system/gpu_memory_usage_megabytes", 1e-6),
}
"""Telemetry series -> MLflow's name of a system metric, and the factor that gives its unit."""
_GPU = {
    "busy_percent": "utilization_percentage",
    "watts": "power_usage_watts",
    "sm_mhz": "sm_clock_mhz",
    "celsius": "temperature_celsius",
}
"""The same of a single GPU: system/gpu_<number>_<name>."""

ALL_WORKLOADS = "all workloads"
"""The prefix of what is said of all workloads together."""
ADDED_LAST = "/as_last"
"""The end of a metric of everything on but one: what that one gains, added last."""
_NOTE_LIMIT = 7_900  # MLflow cuts tags at 8,000 characters
_ABSENT = "n/a"
"""The level of a factor that an engine does not have: MLflow draws a missing parameter as unknown."""


@dataclass(frozen=True)
class Point:
    key: str
    value: float
    step: int = 0
    time_s: float = 0.0  # since the run began


@dataclass(frozen=True)
class View:
    """The content of one MLflow run. details: what is too much for columns, a JSON artifact."""

    name: str
    started_at: str
    duration_s: float
    status: str  # "FINISHED" | "FAILED"
    params: JsonObject
    metrics: list[Point]
    tags: dict[str, str]
    details: JsonObject = field(default_factory=dict)
    workloads: dict[str, PlannedWorkload] = field(default_factory=dict)


def study_view(plan: Plan, found: list[Record], analysis: JsonObject | None) -> View:
    """The run of an execution: its design and its answer. Its numbers are those of its cells."""
    study, profile = plan["study"], plan["profile"]
    all_launches = [record for record in found if record["kind"] == "launch"]
    first = _earliest(all_launches)
    counted = store.counted(found)
    rows = analysis["by_cell"].values() if analysis else ()
    return View(
        name=f"{study['name']} {first['started_at'][:16].replace('T', ' ')}",
        started_at=first["started_at"],
        duration_s=_duration_s(all_launches),
        status="FINISHED" if len(counted) == len(plan["launches"]) else "FAILED",
        params=_filled(
            {
                **{
                    f"factor.{name}": " | ".join(map(str, [f["baseline"], *f["levels"]]))
                    for name, f in study["factors"].items()
                },
                **{f"design.{key}": value for key, value in study["design"].items()},
                **{f"override.{key}": value for key, value in study["overrides"].items()},
                "profile": profile["name"],
                "dtype": plan["model"]["dtype"],
                "metric": study["metric"],
                "smallest_effect": study["smallest_effect"],
                "alpha": study["alpha"],
                "launches": len(plan["launches"]),
            }
        ),
        metrics=[],
        tags=_filled(
            {
                **_common_tags(plan, first),
                **_provenance_tags(plan, first),
                "role": "study",
                "gate": _gate_of_all({row["gate"] for row in rows}) if analysis else None,
                f"{ALL_WORKLOADS}/verdict": analysis["answer"]["verdict"] if analysis else None,
                "evidence": _weakest({row["evidence"] for row in rows}),
                "caveats": _caveats(analysis),
                "nanovllm.counted": f"{len(counted)} of {len(plan['launches'])} launches",
                "mlflow.note.content": describe(plan, analysis),
            }
        ),
        workloads=plan["workloads"],
    )


def cell_view(plan: Plan, cell: str, found: list[Record], analysis: JsonObject | None) -> View:
    """The run of a configuration: what it came to, as the report says it. The cell has a launch."""
    launches = [r for r in found if r["kind"] == "launch" and r["cell"] == cell]
    first = _earliest(launches)
    planned = plan["cells"][cell]
    counted = [record for record in store.counted(found) if record["cell"] == cell]
    row: JsonObject = analysis["by_cell"][cell] if analysis else {}
    start = analysis["shown"][analysis["baseline"]] if analysis else None
    said = (row.get("verdict"), *row.get("verdicts", {}).values())
    levels = dict.fromkeys(plan["study"]["factors"], _ABSENT) | planned["levels"]
    return View(
        name=row.get("shown", cell),
        started_at=first["started_at"],
        duration_s=_duration_s(launches),
        status="FINISHED" if counted else "FAILED",
        params=_filled({**levels, "cell": cell, "engine": planned["engine"]}),
        metrics=[
            *(
                Point(_key(name), rounded(name, value))
                for name, value in row.get("metrics", {}).items()
            ),
            *_curves(row.get("curves", {})),
        ],
        tags=_filled(
            {
                **_common_tags(plan, first),
                "role": "cell",
                "cell_role": planned["role"],
                "gate": row.get("gate"),
                f"{ALL_WORKLOADS}/verdict": in_a_column(row.get("verdict")),
                **{
                    f"{_key(w)}/verdict": in_a_column(verdict)
                    for w, verdict in row.get("verdicts", {}).items()
                },
                **{f"{_key(w)}/CI": within for w, within in row.get("intervals", {}).items()},
                "evidence": row.get("evidence"),
                "compared_with": start if row.get("verdict") else None,
                "caveats": _caveats(analysis),
                "nanovllm.counted": f"{len(counted)} of {sum(entry['cell'] == cell for entry in plan['launches'])} launches",
                "mlflow.note.content": "\n".join(
                    f"- {line}" for line in (*row.get("says", ()), *_maybe(said))
                ),
            }
        ),
        details={"cell": cell, **planned, "report": row},
    )


def _curves(curves: Mapping[str, list[list[float]]]) -> Iterator[Point]:
    """Latency against the rate. MLflow's axis is a whole number of steps: requests per 1,000 s."""
    for name, points in curves.items():
        for rate, seconds in points:
            yield Point(f"curve/{name} by requests per 1000 s", seconds, round(1000 * rate))


def launch_view(plan: Plan, record: LaunchRecord, found: list[Record]) -> View:
    """The run of one launch: what it measured, and what the machine did meanwhile."""
    is_counted = any(
        r["launch"] == record["launch"] and r["attempt"] == record["attempt"]
        for r in store.counted(found)
    )
    attempt = f" (attempt {record['attempt']})" if record["attempt"] > 1 else ""
    reason = f"{record['status']}: {record['reason']}"[:5000] if record["reason"] else None
    return View(
        name=f"{record['launch']}{attempt}",
        started_at=record["started_at"],
        duration_s=record["total_s"] or 0.0,
        status="FINISHED" if record["status"] == "ok" else "FAILED",
        params={"cell": record["cell"], "block": record["block"], "order": record["order"]},
        metrics=list(_of_launch(record)),
        tags=_filled(
            {
                **_common_tags(plan, record),
                "role": "launch",
                "nanovllm.status": record["status"],
                "nanovllm.counted": str(is_counted).lower(),
                "mlflow.note.content": reason,
            }
        ),
        details=_details(record),
        workloads={name: plan["workloads"][name] for name in record["workloads"]},
    )


def figures(work: ServedWorkload) -> dict[str, float]:
    """The figures of one workload of a launch that MLflow shows; the report computes more."""
    to_first = [first - arrival for arrival, first, _ in work["request_times_s"]]
    return {
        "output_tokens_per_s": work["output_tokens"] / work["duration_s"],
        **({"ttft_p50_s": statistics.median(to_first)} if to_first else {}),
    }


def rounded(name: str, value: float) -> float:
    """A metric as people read it: ratios with the decimals that the report gives them, anything else
    with four significant digits, and no fewer than its whole number. The records keep the exact value.
    """
    if not any(part in name for part in ("/speedup", "_ratio", ADDED_LAST)):
        return round(value) if value >= 1000 else float(f"{value:.4g}")
    return round(value, _decimals(value))


def _decimals(ratio: float) -> int:
    """Of a ratio, as in the report: 1.404, 2.20, 20.6."""
    return 3 if ratio < 2 else 2 if ratio < 10 else 1 if ratio < 100 else 0


def in_a_column(verdict: str | None) -> str | None:
    """A verdict as the runs table can show it, where a column is eleven characters wide: "suggestive:
    slower" becomes "slower?". The descriptions of the runs say what the question mark means (_MAYBE).
    """
    _, _, side = (verdict or "").partition(": ")
    return f"{side}?" if side else verdict


_MAYBE = (
    "`faster?` and `slower?` in the table of runs stand for *suggestive*: the interval excludes 1, but "
    "the difference is not significant after correction for several tests."
)


def _maybe(verdicts: Iterable[str | None]) -> list[str]:
    """The explanation of a question mark, where one of these verdicts gets one."""
    return [_MAYBE] if any(in_a_column(said) != said for said in verdicts) else []


def describe(plan: Plan, analysis: JsonObject | None) -> str:
    """The answer, whether the output is the same, the caveats, and the verdicts as a Markdown table: the
    description of a study's run. An optimization that was added last has a row of its own in place of
    everything on but it.
    """
    if analysis is None:
        return f"{_asked(plan)}\n\nNot analysed yet: run `python -m experiments report`, then `import`."
    rows = [
        f"| workload | configuration | ratio to {analysis['shown'][analysis['baseline']]} | interval | blocks | verdict | gate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    last = [
        row
        for row in analysis.get("factors", ())
        if row["kind"] == "left out" and row.get("part_of_all", True)
    ]
    off = {row["off"] for row in last}
    for effect in analysis["effects"]:
        own = effect["metric"] == analysis["metric"]["key"]
        if own and effect["cell"] not in off:
            cell = analysis["by_cell"][effect["cell"]]
            verdict = cell["verdicts"].get(effect["workload"], "-")
            rows.append(_row(effect, cell["shown"], verdict, cell["gate"]))
    for effect in last:
        leans = effect["verdict"] == "inconclusive" and effect.get("leans")
        verdict = f"suggestive: {leans}" if leans else effect["verdict"]
        gates = {analysis["by_cell"][effect[side]]["gate"] for side in ("on", "off")}
        title = f"{effect['factor']}={effect['level']}, added last"
        rows.append(_row(effect, title, verdict, ", ".join(sorted(gates))))
    verdicts = [v for cell in analysis["by_cell"].values() for v in cell["verdicts"].values()]
    notes = [*analysis["answer"]["caveats"], *_maybe(verdicts)]
    text = f"{_answered(analysis)}\n\n{_asked(plan)}\n\n"
    text += "".join(f"- {note}\n" for note in notes) + "\n"
    text += "\n".join(rows)
    return (
        text
        if len(text) < _NOTE_LIMIT
        else text[: text.rindex("\n", 0, _NOTE_LIMIT)] + "\n\nSee the report for the rest."
    )


def experiment_note(plan: Plan, analysis: JsonObject | None) -> str:
    """The description of a study's experiment: the answer of the execution that was imported last, and
    the question.
    """
    asked = f"{plan['study']['title']}. {plan['study']['question'].strip()}"
    return asked if analysis is None else f"{_answered(analysis)}\n\n{asked}"


def _asked(plan: Plan) -> str:
    return f"Question: {plan['study']['question'].strip()}"


def _answered(analysis: JsonObject) -> str:
    """The answer and whether the output is the same; analyses of older versions do not say the latter."""
    answer = analysis["answer"]
    return "\n\n".join(filter(None, [f"**{answer['sentence']}**", answer.get("output", "")]))


def _row(effect: Mapping[str, Any], shown: str, verdict: str, gate: str) -> str:
    ratio, low, high = (
        "-" if (value := effect[key]) is None else f"{value:.{_decimals(value)}f}"
        for key in ("ratio", "low", "high")
    )
    interval = "-" if low == "-" else f"{low} to {high}"
    return f"| {effect['workload']} | {shown} | {ratio} | {interval} | {effect['n']} | {verdict} | {gate} |"


def hardware(record: LaunchRecord) -> str:
    """The devices of a launch as a tag to group by: "2 x NVIDIA H200"."""
    provenance = record["provenance"]
    gpus = Counter(gpu["name"] for gpu in provenance["gpus"])
    named = " + ".join(f"{n} x {name}" if n > 1 else name for name, n in gpus.items())
    return named or f"{provenance['cpu']['model']}, {provenance['cpu']['cores']} cores"


def gpu_summaries(record: LaunchRecord) -> dict[str, dict[str, dict[str, float]]]:
    """{"gpu_0": {"watts": {"min", "mean", "max"}}} of every GPU of a launch."""
    series: dict[str, dict[str, list[float]]] = {}
    for sample in record["telemetry"]["samples"]:
        for number, gpu in enumerate(sample.get("gpus") or ()):
            for name, value in gpu.items():
                if isinstance(value, int | float):
                    series.setdefault(f"gpu_{number}", {}).setdefault(name, []).append(value)
    return {
        gpu: {
            name: {"min": min(values), "mean": statistics.fmean(values), "max": max(values)}
            for name, values in of_gpu.items()
        }
        for gpu, of_gpu in series.items()
    }


def _common_tags(plan: Plan, record: LaunchRecord) -> dict[str, str | None]:
    """What people search and group by, on every run."""
    return {
        "hardware": hardware(record),
        "model": plan["model"]["preset"] or plan["model"]["path"],
        "mlflow.source.name": f"ablations/studies/{plan['study']['name']}.yaml",
        "mlflow.user": _user(),
    }


def _provenance_tags(plan: Plan, record: LaunchRecord) -> dict[str, str | None]:
    provenance = record["provenance"]
    git: GitState | JsonObject = provenance["git"] or {}
    return {
        "nanovllm.plan_hash": plan["plan_hash"],
        "nanovllm.hostname": provenance["hostname"],
        "nanovllm.code_digest": provenance["code_digest"],
        "nanovllm.model_digest": plan["model"]["digest"],
        "git.dirty": str(git.get("dirty")).lower(),
        "git.dirty_digest": git.get("dirty_digest"),
        "git.branch": git.get("branch"),
        "mlflow.source.git.commit": git.get("commit"),
        **{
            f"nanovllm.fingerprint.{name}": work["fingerprint"]
            for name, work in plan["workloads"].items()
        },
    }


def _user() -> str | None:
    """The user of this process. Records do not name the user; who runs a study imports it too."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return None


def _caveats(analysis: JsonObject | None) -> str | None:
    return "; ".join(analysis["answer"]["caveats"])[:5000] if analysis else None


def _gate_of_all(found: set[str]) -> str:
    return next((said for said in ("fail", "pass") if said in found), "descriptive")


def _weakest(found: set[str]) -> str | None:
    """The evidence of a study: that of its weakest cell that has any."""
    return next(
        (e for e in ("single block", "descriptive", "intervals", "none") if e in found), None
    )


def _of_launch(record: LaunchRecord) -> Iterator[Point]:
    for workload, work in record["workloads"].items():
        for name, value in figures(work).items():
            yield Point(f"{workload}/{name}", rounded(name, value))
    for step, sample in enumerate(record["telemetry"]["samples"]):
        for series, (name, scale) in _SYSTEM.items():
            if sample.get(series) is not None:
                yield Point(name, sample[series] * scale, step, sample["time_s"])
        for number, gpu in enumerate(sample.get("gpus") or ()):
            for series, name in _GPU.items():
                if gpu.get(series) is not None:
                    key = f"system/gpu_{number}_{name}"
                    yield Point(key, gpu[series], step, sample["time_s"])


def _details(record: LaunchRecord) -> JsonObject:
    """Everything of a launch but its series: requests, steps and samples stay in records.jsonl."""
    series = ("request_times_s", "step_times_s", "load")
    telemetry = {k: v for k, v in record["telemetry"].items() if k != "samples"}
    return {
        **record,
        "workloads": {
            name: {
                **{key: value for key, value in work.items() if key not in series},
                **({"load": _load(work["load"])} if "load" in work else {}),
            }
            for name, work in record["workloads"].items()
        },
        "telemetry": {**telemetry, "gpus": gpu_summaries(record)},
    }


def _load(load: Load) -> JsonObject:
    return {key: value for key, value in load.items() if key not in ("sent_s", "token_gaps_us")}


def _filled(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that say nothing."""
    return {name: value for name, value in entries.items() if value not in (None, "", [], {}, ())}


def _key(name: str) -> str:
    """A name as MLflow allows it for a metric: no equals sign."""
    return name.replace("=", ":").replace("+", " and ")


def _earliest(launches: list[LaunchRecord]) -> LaunchRecord:
    """Records of a cluster, or of merged folders, are not in chronological order."""
    return min(launches, key=lambda record: record["started_at"])


def _duration_s(launches: list[LaunchRecord]) -> float:
    first, last = _earliest(launches), max(launches, key=lambda record: record["started_at"])
    return _seconds_between(first["started_at"], last["started_at"]) + (last["total_s"] or 0.0)


def _seconds_between(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
