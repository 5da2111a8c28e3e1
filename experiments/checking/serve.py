"""Serves the workloads of a check with one engine, in a process and an interpreter of its own.

    PYTHON -m experiments.checking.serve --job job.json --work work.json --model DIR --out
    served.json

Needs only the standard library and that engine. Works with every adapter of `experiments.engines`;
those that have `logprobs` are asked for log-probabilities in a second pass. Only HF can be broken
on purpose (`broken`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from experiments.checking.results import JobResult, Served
from experiments.engines import Adapter, load_adapter
from experiments.host.validity import wrong_toggles
from experiments.launch.engine_process import die_with_runner, named
from experiments.records.types import JsonObject, LogprobAnswer, Request


def serve(job: JsonObject, work: dict[str, list[Request]], model: str) -> JobResult:
    """{"workloads": {name: {"outputs", "finish_reasons"}}, "logprobs": {...} | None, "toggles",
    "problems", "duration_s"}.
    """
    adapter = load_adapter(job["engine"])(model, job["config"])
    resolved = adapter.load()
    if job["broken"] is not None:
        from experiments.gate.negative_controls import CONTROL_PROMPT, controls

        controls(CONTROL_PROMPT)[job["broken"]](adapter._model)  # type: ignore[attr-defined]
    begin = time.perf_counter()
    served = {name: answer(adapter, work[name]) for name in job["workloads"]}
    toggles = named(adapter.toggles())
    logprobs: dict[str, LogprobAnswer] | None = None
    if job["logprobs"] and hasattr(adapter, "logprobs"):
        adapter.reset()
        logprobs = {name: adapter.logprobs(work[name]) for name in job["logprobs"]}
    duration_s = time.perf_counter() - begin
    adapter.close()
    problems = wrong_toggles(toggles, job["config"])
    return {
        "job": job["name"],
        "workloads": served,
        "logprobs": logprobs,
        "toggles": toggles,
        "problems": problems,
        "resolved": resolved,
        "duration_s": duration_s,
    }


def answer(adapter: Adapter, requests: list[Request]) -> Served:
    """Outputs and finish reasons in the order of the requests. HF's `generate` needs the same
    sampling parameters for all requests of a batch, so requests are grouped by them. The prefix
    cache is kept between workloads, so that later ones hit it.
    """
    if adapter.name != "hf":
        served = adapter.serve(requests)
        return {"outputs": served["outputs"], "finish_reasons": served["finish_reasons"]}
    outputs, reasons = [[0]] * len(requests), [""] * len(requests)

    def setting(i: int) -> tuple[Any, ...]:
        return tuple(requests[i][name] for name in ("temperature", "top_k", "top_p", "ignore_eos"))

    for _, group in itertools.groupby(sorted(range(len(requests)), key=setting), key=setting):
        members = list(group)
        served = adapter.serve([requests[i] for i in members])
        for i, output, reason in zip(
            members, served["outputs"], served["finish_reasons"], strict=True
        ):
            outputs[i], reasons[i] = output, reason
    return {"outputs": outputs, "finish_reasons": reasons}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.checking.serve", description="Serve the workloads of a check."
    )
    for name in ("job", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    die_with_runner()
    served = serve(
        json.loads(given.job.read_text()), json.loads(given.work.read_text()), given.model
    )
    partial = given.out.with_suffix(".partial")
    partial.write_text(json.dumps(served))
    partial.rename(given.out)


if __name__ == "__main__":
    main()
