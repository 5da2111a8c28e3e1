"""Runs the gate over all outputs of a check, in a separate process with torch and transformers.

    python -m experiments.checking.judging --folder DIR --model DIR

reads DIR/jobs.json, work.json and served/, prints a line "progress DONE TOTAL" after each verdict,
and writes DIR/verdicts.json: a list of {"name", "group", "dtype", "expected", "status", "good",
"reason", ...}. `good`: the verdict is the expected one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from experiments.checking.jobs import CONTROL, SAMPLED, TRUNCATED, Job
from experiments.checking.results import JobResult, Line, Logprobs, Noise, Served
from experiments.checking.work import Workloads
from experiments.gate.judge import judge_outputs, make_rescorer
from experiments.gate.lossy.recipe import EXACT, Recipe, recipe_of
from experiments.gate.negative_controls import tamper
from experiments.gate.rescoring import Rescorer
from experiments.gate.rules import GateParams, GateResult, compare_logprobs, judge
from experiments.gate.same_work import read_vocabulary, same_work
from experiments.gate.verdicts import NATIVE_ENGINES
from experiments.records.types import GateStatus, Request

HOTTER = 1.25


class Judge:
    """Holds a rescorer for each dtype, the workloads, and the outputs of each job."""

    def __init__(
        self, model: Path, work: Workloads, jobs: Sequence[Job], served: dict[str, JobResult]
    ) -> None:
        self.model, self.work, self.served = model, work, served
        self.jobs = {job.name: job for job in jobs}
        self.params = GateParams()
        self.eos_ids, self.vocab_size = read_vocabulary(model)
        self._rescorers: dict[tuple[str, Recipe], Rescorer] = {}

    def rescorer(self, dtype: str, recipe: Recipe = EXACT) -> Rescorer:
        """Those of exact engines are kept, of the others only the last one."""
        key = dtype, recipe
        if key not in self._rescorers:
            kept = self._rescorers.items()
            self._rescorers = {known: rescorer for known, rescorer in kept if known[1] == EXACT}
            self._rescorers[key] = make_rescorer(self.model, dtype, self.params, recipe=recipe)
        return self._rescorers[key]

    def verdict(self, job: Job) -> Line:
        """The verdict on one job: work, tokens, log-probabilities and toggles; and how many outputs
        equal those of the job it is `like`.
        """
        begin = time.perf_counter()
        served = self.served[job.name]
        if "error" in served:
            return self._line(job, None, served["error"])
        problems = list(served["problems"])
        for name in job.workloads:
            problems += self._wrong_work(name, served["workloads"][name])
        if problems:
            return self._line(job, None, "not the same work: " + "; ".join(problems[:3]))
        requests, outputs = self._of(job.name, job.workloads)
        result = judge_outputs(
            self.rescorer(job.dtype, recipe_of(job.config)),
            requests,
            outputs,
            self.params,
            unknown_noise=job.engine not in NATIVE_ENGINES,
        )
        logprobs = self._logprobs(job)
        reasons = [reason for reason in (result.reason, logprobs and logprobs["reason"]) if reason]
        line = self._line(job, result, "; ".join(reasons) or None)
        line["logprobs"] = logprobs
        line["serve_s"] = served["duration_s"]
        line["judge_s"] = time.perf_counter() - begin
        if logprobs and logprobs["status"] == "fail":
            line["status"] = "fail"
        # both the tokens and the log-probabilities must reveal a broken engine
        if job.expected == "fail":
            line["status"] = (
                result.status if not logprobs or logprobs["status"] == "fail" else "pass"
            )
        if job.like and "error" not in self.served[job.like]:
            line["answers"], line["identical"] = self._likeness(job)
        line["good"] = line["status"] == job.expected
        return line

    def controls(self, dtype: str) -> list[Line]:
        """Verdicts on outputs or settings that were tampered with; all have to fail."""
        native = self._of(f"nanovllm {dtype}: baseline", (CONTROL, SAMPLED, TRUNCATED))
        sampled_by_hf = self._of(f"hf {dtype}: batches of 48", (SAMPLED,))
        rescorer = self.rescorer(dtype)
        lines = []

        def add(
            name: str,
            requests: list[Request],
            outputs: list[list[int]],
            unknown_noise: bool = False,
        ) -> None:
            result = judge_outputs(
                rescorer, requests, outputs, self.params, unknown_noise=unknown_noise
            )
            lines.append(self._control(name, dtype, result))

        what, tampered = tamper(rescorer, *native, self.params)
        add(f"one token: {what}", native[0], tampered)
        reseeded: list[Request] = [
            {**request, "seed": request["seed"] + 1} for request in native[0]
        ]
        add(
            "sampled with other seeds",
            reseeded,
            native[1],
        )
        add("two outputs swapped", native[0], [native[1][1], native[1][0], *native[1][2:]])
        colder: list[Request] = [
            {**request, "temperature": request["temperature"] / HOTTER}
            for request in sampled_by_hf[0]
        ]
        add(
            f"HF's samples at {HOTTER:g} times the temperature",
            colder,
            sampled_by_hf[1],
            unknown_noise=True,
        )
        return lines

    def lower_precision(self) -> Line:
        """The verdict on bfloat16 outputs judged as float32; it has to fail."""
        requests, outputs = self._of("hf bfloat16: batches of 48", (CONTROL,))
        result = judge_outputs(self.rescorer("float32"), requests, outputs, self.params)
        return self._control("HF in bfloat16, judged as float32", "float32", result)

    def _of(self, job: str, names: Sequence[str]) -> tuple[list[Request], list[list[int]]]:
        served = self.served[job]["workloads"]
        return (
            [request for name in names for request in self.work[name]],
            [output for name in names for output in served[name]["outputs"]],
        )

    def _wrong_work(self, name: str, served: Served) -> list[str]:
        reasons = served["finish_reasons"]
        counts = {reason: reasons.count(reason) for reason in set(reasons)}
        found = same_work(self.work[name], served["outputs"], counts, self.eos_ids, self.vocab_size)
        return [f"{name}: {problem}" for problem in found]

    def _logprobs(self, job: Job) -> Logprobs | None:
        served = self.served[job.name]["logprobs"]
        if not served:
            return None
        requests = [request for name in job.logprobs for request in self.work[name]]
        outputs = [output for name in job.logprobs for output in served[name]["outputs"]]
        values = [value for name in job.logprobs for value in served[name]["logprobs"]]
        unknown_noise = job.engine not in NATIVE_ENGINES
        rescorer = self.rescorer(job.dtype, recipe_of(job.config))
        scores = rescorer.score(requests, outputs, unknown_noise=unknown_noise)
        result = compare_logprobs(scores, values, job.dtype, self.params)
        return {
            "status": result.status,
            "reason": result.reason,
            "positions": result.positions,
            "engine_error": result.engine_error,
            "hf_error": result.hf_error,
            "bound": result.bound,
        }

    def _likeness(self, job: Job) -> tuple[int, int]:
        """The number of outputs, and of those that are identical to the other job's. Where two outputs differ,
        the first difference follows the same tokens, so the gate has judged it in both: it is a
        near-tie or a failure.
        """
        assert job.like is not None
        names = [name for name in job.workloads if name in self.jobs[job.like].workloads]
        ours, theirs = (self._of(name, names)[1] for name in (job.name, job.like))
        return len(ours), sum(a == b for a, b in zip(ours, theirs, strict=True))

    def _line(self, job: Job, result: GateResult | None, reason: str | None) -> Line:
        status: GateStatus = "error" if result is None else result.status
        return {
            "name": job.name,
            "group": job.group,
            "dtype": job.dtype,
            "expected": job.expected,
            "status": status,
            "good": False,
            "reason": reason,
            "gate": result.as_verdict() if result else None,
        }

    def _control(self, name: str, dtype: str, result: GateResult) -> Line:
        return {
            "name": f"tampered {dtype}: {name}",
            "group": "correct outputs, changed afterwards",
            "dtype": dtype,
            "expected": "fail",
            "status": result.status,
            "good": result.status == "fail",
            "reason": result.reason,
            "gate": result.as_verdict(),
        }


def noise(judge_of: Judge, dtype: str) -> Noise:
    """HF's own error in `dtype` on the baseline's outputs of the control workloads: the noise from
    which bounds are calculated.
    """
    requests, outputs = judge_of._of(f"nanovllm {dtype}: baseline", (CONTROL, SAMPLED, TRUNCATED))
    result = judge(judge_of.rescorer(dtype).score(requests, outputs), dtype, judge_of.params)
    return {"bound": result.bound, "tokens": result.tokens_checked, **result.calibration}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.checking.judging", description="Judge the outputs of a check."
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    given = parser.parse_args()
    disable_progress_bar()
    jobs = [Job(**job) for job in json.loads((given.folder / "jobs.json").read_text())]
    served = {
        job.name: json.loads((given.folder / "served" / f"{i:02d}.json").read_text())
        for i, job in enumerate(jobs)
    }
    judge_of = Judge(
        given.model, json.loads((given.folder / "work.json").read_text()), jobs, served
    )
    lines: list[Line] = []
    for job in jobs:
        lines.append(judge_of.verdict(job))
        print(f"progress {len(lines)} {len(jobs) + 1}", flush=True)
    dtypes = list(dict.fromkeys(job.dtype for job in jobs))
    intact = {line["name"] for line in lines if line["status"] != "error"}
    noises = {}
    for dtype in dtypes:
        if {f"nanovllm {dtype}: baseline", f"hf {dtype}: batches of 48"} <= intact:
            lines += judge_of.controls(dtype)
            noises[dtype] = noise(judge_of, dtype)
    if {"float32", "bfloat16"} <= set(dtypes) and "hf bfloat16: batches of 48" in intact:
        lines.append(judge_of.lower_precision())
    (given.folder / "verdicts.json").write_text(
        json.dumps({"lines": lines, "noise": noises}, indent=1) + "\n"
    )
    print(f"progress {len(jobs) + 1} {len(jobs) + 1}", flush=True)


if __name__ == "__main__":
    main()
