"""Launches of a model that no reference can judge: what they measured, and nothing concluded from
it.

Weights of the largest shapes are made on the GPUs and are no files (nanovllm.models.generated).
Where no reference fits beside them, the gate has no word on the outputs, and without it no launch
counts: a report has no ratio and no verdict. What remains is shown as it was measured, under the
name of what it is. A model whose outputs the gate has judged is never shown so.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.host.model_files import GENERATED
from experiments.records.types import Plan
from reports.analysis.counting import Counted
from reports.analysis.gate_lines import Gate

Record = Mapping[str, Any]


def is_descriptive(plan: Plan, gate: Gate) -> bool:
    """Whether the weights were generated, and not one output was judged."""
    return plan["model"].get("preset") in GENERATED and not gate.lines


def decode_step_s(record: Record, workload: str) -> float | None:
    """The median duration of the steps that prefill nothing; None where a launch recorded no steps
    (replicas).
    """
    steps = [
        seconds
        for seconds, prefill, _ in record["workloads"][workload]["step_times_s"] or ()
        if not prefill
    ]
    return statistics.median(steps) if steps else None


def decode_steps_s(
    records: Sequence[Record], workload_names: Iterable[str]
) -> dict[tuple[str, str], float]:
    """{(cell, workload): the median over launches of their median decode step}, of launches that
    finished.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for workload in workload_names:
        for record in records:
            finished = record["kind"] == "launch" and record["status"] == "ok"
            if finished and (step := decode_step_s(record, workload)) is not None:
                found.setdefault((record["cell"], workload), []).append(step)
    return {key: statistics.median(steps) for key, steps in found.items()}


def measured(
    records: Sequence[Record], plan: Plan, gate: Gate, counted: Counted
) -> list[dict[str, Any]]:
    """One row a workload and cell: launches, least, median and greatest throughput, median decode
    step; [] where is_descriptive says no.

    Of the launches that finished and contradict neither the plan nor themselves: those that lack
    the gate's word alone.
    """
    if not is_descriptive(plan, gate):
        return []
    lacking = {
        (row["launch"], row["attempt"])
        for row in counted.excluded
        if row["reason"].startswith("the gate did not check")
    }
    chosen = {
        (record["launch"], record["attempt"]): record
        for record in records
        if record["kind"] == "launch" and (record["launch"], record["attempt"]) in lacking
    }
    rows = []
    for workload in plan["workloads"]:
        for cell in plan["cells"]:
            own = [record for record in chosen.values() if record["cell"] == cell]
            if not own:
                continue
            works = [record["workloads"][workload] for record in own]
            rates = sorted(work["output_tokens"] / work["duration_s"] for work in works)
            steps = [
                step for record in own if (step := decode_step_s(record, workload)) is not None
            ]
            rows.append(
                {
                    "workload": workload,
                    "cell": cell,
                    "n": len(own),
                    "least": rates[0],
                    "median": statistics.median(rates),
                    "most": rates[-1],
                    "step_s": statistics.median(steps) if steps else None,
                }
            )
    return rows
