"""The params, metrics and tags of MLflow runs, as pure functions of records, without MLflow.

A metric's name holds the workload and, in the parent run, the cell. The parent run has a value per
block, with the block as the step.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from experiments.records import store
from experiments.records.types import (
    GitState,
    JsonObject,
    LaunchRecord,
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
    "gpu0_busy_percent": ("system/gpu_0_utilization_percentage", 1.0),
    "gpu0_watts": ("system/gpu_0_power_usage_watts", 1.0),
    "gpu0_sm_mhz": ("system/gpu_0_sm_clock_mhz", 1.0),
    "gpu0_celsius": ("system/gpu_0_temperature_celsius", 1.0),
}
"""Telemetry series -> MLflow's name of a system metric, and the factor that gives its unit."""

_NOTE_LIMIT = 7_900  # MLflow cuts tags at 8,000 characters


@dataclass(frozen=True)
class Point:
    key: str
    value: float
    step: int = 0
    time_s: float = 0.0  # since the run began


@dataclass(frozen=True)
class View:
    """The content of one MLflow run."""

    name: str
    started_at: str
    duration_s: float
    status: str  # "FINISHED" | "FAILED"
    params: JsonObject
    metrics: list[Point]
    tags: dict[str, str]
    workloads: dict[str, PlannedWorkload] = field(default_factory=dict)


def parent_view(plan: Plan, found: list[Record], analysis: JsonObject | None) -> View:
    """The run of an execution: its design, every counted figure by block, effects and verdicts."""
    study, model, profile = plan["study"], plan["model"], plan["profile"]
    all_launches = [record for record in found if record["kind"] == "launch"]
    # Records of a cluster, or of merged folders, are not in chronological order.
    first = min(all_launches, key=lambda record: str(record["started_at"]))
    last = max(all_launches, key=lambda record: str(record["started_at"]))
    counted = store.counted(found)
    gate = [r["status"] for r in found if r["kind"] == "gate" and not r["is_negative_control"]]
    return View(
        name=f"{study['name']} {first['started_at'][:16].replace('T', ' ')}",
        started_at=first["started_at"],
        duration_s=_seconds_between(first["started_at"], last["started_at"])
        + (last["total_s"] or 0.0),
        status="FINISHED" if len(counted) == len(plan["launches"]) else "FAILED",
        params={
            **{
                f"factor.{name}": " | ".join(map(str, [f["baseline"], *f["levels"]]))
                for name, f in study["factors"].items()
            },
            **{f"design.{key}": value for key, value in study["design"].items()},
            **{f"override.{key}": value for key, value in study["overrides"].items()},
            "profile": profile["name"],
            "model": model["preset"] or model["path"],
            "dtype": model["dtype"],
            "metric": study["metric"],
            "smallest_effect": study["smallest_effect"],
            "alpha": study["alpha"],
            "launches": len(plan["launches"]),
        },
        metrics=[*_by_block(counted), *_effects(analysis)],
        tags={
            **_common_tags(plan, first),
            "nanovllm.counted": f"{len(counted)} of {len(plan['launches'])} launches",
            "nanovllm.gate": ", ".join(f"{gate.count(s)} {s}" for s in ("pass", "fail", "error"))
            if gate
            else "not run",
            "mlflow.note.content": describe(plan, analysis),
        },
        workloads=plan["workloads"],
    )


def launch_view(plan: Plan, record: LaunchRecord, found: list[Record]) -> View:
    """The run of one launch: levels of its factors, measurements and telemetry."""
    cell = plan["cells"][record["cell"]]
    config = {key: value for key, value in record["requested"].items() if key != "optimizations"}
    is_counted = any(
        r["launch"] == record["launch"] and r["attempt"] == record["attempt"]
        for r in store.counted(found)
    )
    attempt = f" (attempt {record['attempt']})" if record["attempt"] > 1 else ""
    return View(
        name=f"{record['launch']}{attempt}",
        started_at=record["started_at"],
        duration_s=record["total_s"] or 0.0,
        status="FINISHED" if record["status"] == "ok" else "FAILED",
        params={
            **cell["levels"],
            "cell": record["cell"],
            "engine": record["engine"],
            "block": record["block"],
            "order": record["order"],
            "seed": record["seed"],
            **{f"config.{key}": value for key, value in config.items()},
        },
        metrics=list(_of_launch(record)),
        tags={
            **_common_tags(plan, record),
            "nanovllm.status": record["status"],
            "nanovllm.counted": str(is_counted).lower(),
            **(
                {"mlflow.note.content": f"{record['status']}: {record['reason']}"[:5000]}
                if record["reason"]
                else {}
            ),
        },
        workloads={name: plan["workloads"][name] for name in record["workloads"]},
    )


def figures(work: ServedWorkload) -> dict[str, float]:
    """The figures of one workload of a launch that MLflow shows; the report computes more."""
    to_first = [first - arrival for arrival, first, _ in work["request_times_s"]]
    return {
        "output_tokens_per_s": work["output_tokens"] / work["duration_s"],
        "duration_s": work["duration_s"],
        **({"time_to_first_token_p50_s": statistics.median(to_first)} if to_first else {}),
    }


def describe(plan: Plan, analysis: JsonObject | None) -> str:
    """The verdicts as a Markdown table: the description of the parent run."""
    head = f"**{plan['study']['question'].strip()}**\n\n"
    if analysis is None:
        return head + "Not analysed yet: run `python -m experiments report`, then `import`."
    effects = [e for e in analysis["effects"] if e["metric"] == analysis["metric"]["key"]]
    rows = [
        "| workload | cell | ratio to baseline | interval | blocks | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for e in effects:
        ratio = "-" if e["ratio"] is None else f"{e['ratio']:.3f}"
        interval = "-" if e["low"] is None else f"{e['low']:.3f} to {e['high']:.3f}"
        rows.append(
            f"| {e['workload']} | {e['cell']} | {ratio} | {interval} | {e['n']} | {e['verdict']} |"
        )
    text = f"{head}{analysis['answer']['sentence']}\n\n" + "\n".join(rows)
    return (
        text
        if len(text) < _NOTE_LIMIT
        else text[: text.rindex("\n", 0, _NOTE_LIMIT)] + "\n\nSee the report for the rest."
    )


def _common_tags(plan: Plan, record: LaunchRecord) -> dict[str, str]:
    provenance = record["provenance"]
    git: GitState | JsonObject = provenance["git"] or {}
    gpus = [gpu["name"] for gpu in provenance["gpus"]]
    tags = {
        "nanovllm.plan_hash": plan["plan_hash"],
        "nanovllm.hardware": " + ".join(gpus)
        or f"{provenance['cpu']['model']}, {provenance['cpu']['cores']} cores",
        "nanovllm.hostname": provenance["hostname"],
        "nanovllm.code_digest": provenance["code_digest"],
        "nanovllm.model_digest": plan["model"]["digest"],
        "git.dirty": str(git.get("dirty")).lower(),
        "git.dirty_digest": git.get("dirty_digest"),
        "git.branch": git.get("branch"),
        "mlflow.source.git.commit": git.get("commit"),
        "mlflow.source.name": f"ablations/studies/{plan['study']['name']}.yaml",
        "mlflow.user": "nanovllm",
        **{
            f"nanovllm.fingerprint.{name}": work["fingerprint"]
            for name, work in plan["workloads"].items()
        },
    }
    return {name: value for name, value in tags.items() if value}


def _by_block(counted: list[LaunchRecord]) -> Iterator[Point]:
    for record in counted:
        for workload, work in record["workloads"].items():
            for name, value in figures(work).items():
                yield Point(
                    f"{workload}/{name}/{_key(record['cell'])}", value, step=record["block"]
                )


def _effects(analysis: JsonObject | None) -> Iterator[Point]:
    for effect in analysis["effects"] if analysis else ():
        if effect["metric"] == analysis["metric"]["key"]:  # type: ignore[index]
            for bound in ("ratio", "low", "high"):
                if effect[bound] is not None:
                    yield Point(
                        f"effect/{effect['workload']}/{_key(effect['cell'])}/{bound}", effect[bound]
                    )


def _of_launch(record: LaunchRecord) -> Iterator[Point]:
    times = {
        "process_start_s": record["process_start_s"],
        "load_s": record["load_s"],
        "warm_up_s": record["warm_up_s"],
        "total_s": record["total_s"],
    }
    for name, seconds in times.items():
        if seconds is not None:
            yield Point(name, seconds)
    peak = record["peak_memory_bytes"]
    for where, size in (("host", peak["host"]), ("device", peak["device"])):
        if size is not None:
            yield Point(f"peak_memory_bytes/{where}", size)
    for workload, work in record["workloads"].items():
        for name, value in figures(work).items():
            yield Point(f"{workload}/{name}", value)
    for factor, toggle in record["toggles"].items():
        yield Point(f"toggle/{factor}/engaged", toggle["engaged"])
        if toggle["opportunity"] is not None:
            yield Point(f"toggle/{factor}/opportunity", toggle["opportunity"])
    for step, sample in enumerate(record["telemetry"]["samples"]):
        for series, (name, scale) in _SYSTEM.items():
            if sample.get(series) is not None:
                yield Point(name, sample[series] * scale, step, sample["time_s"])


def _key(cell: str) -> str:
    """A cell's name as MLflow allows it in the name of a metric: no equals sign."""
    return cell.replace("=", ":").replace("+", " and ")


def _seconds_between(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
