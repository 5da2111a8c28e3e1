"""The equivalence gate: a speed is only reported if its outputs are equivalent to those of HF
transformers.

    python -m experiments.gate --plan plan.json --out DIR [--resume] [--negative-control]
    [--model DIR]

reads the launch records and tokens of DIR, rescores every distinct output (workload, tokens
digest), and appends a gate record for each to DIR/records.jsonl. Exit status 0: all pass; 1:
something failed; 2: the folder or the plan cannot be used. With --negative-control it breaks the
reference and the tokens instead, and exits with 1 if any of that passes.

`rescoring.py` computes scores, `rules.py` decides, `negative_controls.py` breaks things; this
module reads and writes records. It runs as a separate process, which needs torch and transformers,
but neither pydantic nor MLflow.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from experiments import workloads
from experiments.gate.lossy.recipe import EXACT, Recipe, recipe_of
from experiments.gate.rescoring import Mutation, Rescorer
from experiments.gate.rules import GateParams, GateResult, judge
from experiments.gate.same_work import read_vocabulary, same_work
from experiments.gate.verdicts import GateError, Work, find_work, gate_record, read_tokens
from experiments.host.model_files import ModelError, locate
from experiments.load import own_answers
from experiments.records import store
from experiments.records.types import GateRecord, Plan, PlannedModel, Request, Workload


def rescore(
    model_dir: str | Path,
    dtype: str,
    requests: Sequence[Request],
    outputs: Sequence[Sequence[int]],
    params: GateParams | None = None,
    *,
    unknown_noise: bool = False,
    mutate: Mutation | None = None,
    recipe: Recipe = EXACT,
) -> GateResult:
    """Judges outputs (token ids, in the order of the requests) of an engine that ran `model_dir` in
    `dtype`.

    dtype: a key of REFERENCE_DTYPE. unknown_noise: tokens were sampled with a random generator other than
    ours. mutate: breaks the reference (negative controls). recipe: what the engine rounds. To judge many outputs of one model, keep
    a `Rescorer` and call `judge_outputs`.
    """
    params = params or GateParams()
    return judge_outputs(
        make_rescorer(model_dir, dtype, params, mutate, recipe),
        requests,
        outputs,
        params,
        unknown_noise=unknown_noise,
    )


def make_rescorer(
    model_dir: str | Path,
    dtype: str,
    params: GateParams,
    mutate: Mutation | None = None,
    recipe: Recipe = EXACT,
) -> Rescorer:
    return Rescorer(
        model_dir,
        dtype,
        mutate=mutate,
        batch_tokens=params.batch_tokens,
        logits_bytes=params.logits_bytes,
        recipe=recipe,
    )


def judge_outputs(
    rescorer: Rescorer,
    requests: Sequence[Request],
    outputs: Sequence[Sequence[int]],
    params: GateParams,
    *,
    unknown_noise: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> GateResult:
    started = time.perf_counter()
    scores = rescorer.score(requests, outputs, unknown_noise=unknown_noise, progress=progress)
    budgets = [request["max_tokens"] for request in requests]
    result = judge(scores, rescorer.dtype, params, budgets)
    return dataclasses.replace(result, duration_s=time.perf_counter() - started)


def check_same_work(
    plan: Plan,
    work: Work,
    requests: list[Request],
    outputs: list[list[int]],
    model_dir: Path,
) -> list[str]:
    """Rule 1, for every launch that generated these tokens: fingerprint, lengths, finish reasons."""
    problems = []
    fingerprint = plan["workloads"][work.workload]["fingerprint"]
    eos_token_ids, vocab_size = read_vocabulary(model_dir)
    for launch in work.launches:
        served = launch["workloads"][work.workload]
        found = same_work(requests, outputs, served["finish_reasons"], eos_token_ids, vocab_size)
        if served["fingerprint"] != fingerprint:
            found.append(
                f"workload fingerprint is {served['fingerprint']}, the plan's is {fingerprint}"
            )
        if served["num_requests"] != len(requests):
            found.append(f"{served['num_requests']} of {len(requests)} requests were served")
        problems += [f"launch {launch['launch']}: {problem}" for problem in found]
    return problems


def find_model(model: PlannedModel, folder: Path | None = None) -> Path:
    """The checkpoint's folder, from a plan's `model` or given by `folder`. Builds a preset that is
    not in the cache yet.

    The digest of the files that will be loaded is compared with the plan's. Raises GateError.
    """
    chosen: PlannedModel = {**model, "digest": model.get("digest")}  # not in older plans
    if folder:
        chosen = {**chosen, "preset": None, "path": str(folder)}
    try:
        path = locate(chosen, here=True)
    except ModelError as error:
        raise GateError(str(error)) from error
    if not (path / "config.json").is_file():
        raise GateError(
            f"the plan's model {path} has no config.json on this machine; give --model FOLDER"
        )
    return path


def failed_same_work(problems: list[str]) -> GateResult:
    return GateResult(
        "fail", "not the same work: " + "; ".join(problems[:5]), 0, 0, 0, 0.0, 0.0, {}, None
    )


class Gate:
    """The gate over one folder of records. Models are loaded when first needed."""

    def __init__(self, plan: Plan, folder: store.Folder, model: Path | None = None) -> None:
        """model: the folder of the plan's checkpoint, if it is elsewhere on this machine. Raises
        GateError.
        """
        self.plan, self.folder = plan, folder
        try:
            self.params = GateParams.from_plan(plan["gate"])
        except ValueError as error:
            raise GateError(str(error)) from error
        self.model_dir = find_model(plan["model"], model)
        self._rescorers: dict[Recipe, Rescorer] = {}
        self._drawn: dict[str, Workload] = {}

    def requests_of(self, workload: str) -> list[Request]:
        """The requests of a workload as drawn, all waves in order. Raises GateError if their
        fingerprint is not the plan's.
        """
        if workload not in self._drawn:
            try:
                self._drawn[workload] = workloads.rebuild(
                    workload, self.plan["workloads"][workload]
                )
            except ValueError as error:
                raise GateError(str(error)) from error
        return [request for wave in self._drawn[workload]["waves"] for request in wave]

    def requests_as_served(self, workload: str, outputs: list[list[int]]) -> list[Request]:
        """The same with the prompts that an engine with these outputs was given: where a turn holds
        the engine's own answer to the one before, that answer is part of its prompt.
        """
        requests = self.requests_of(workload)
        schedule = self._drawn[workload].get("arrivals")
        if schedule is None or not own_answers.wanted(schedule):
            return requests
        return own_answers.as_served(requests, schedule["after"], outputs)

    def rescorer(self, recipe: Recipe = EXACT) -> Rescorer:
        """Of engines that round by `recipe`. That of exact engines is kept, of the others only the last one."""
        if recipe not in self._rescorers:
            self._rescorers = {EXACT: self._rescorers[EXACT]} if EXACT in self._rescorers else {}
            dtype = self.plan["model"]["dtype"]
            what = "" if recipe == EXACT else f", both with {recipe}"
            say(f"loading the HF model in {dtype} and as the reference{what}")
            self._rescorers[recipe] = make_rescorer(
                self.model_dir, dtype, self.params, recipe=recipe
            )
        return self._rescorers[recipe]

    def recipes_of(self, work: Work) -> list[Recipe]:
        """What the engines that generated these tokens round, beyond their dtype. Each of them is judged by a reference that
        rounds in the same way: the unquantized one says nothing about a quantized engine's tokens.
        """
        return sorted({recipe_of(launch.get("resolved") or {}) for launch in work.launches})

    def pending(self, resume: bool) -> list[Work]:
        """The outputs that are to be judged; without `resume`, all of them. A later gate record of
        the same tokens replaces an earlier one.
        """
        judged = self.verdicts()
        return [
            work
            for work in self.all_work()
            if not resume or judged.get(work.key, "error") == "error"
        ]

    def verdicts(self) -> dict[tuple[str, str], str]:
        """The status of the last gate record of each (workload, tokens digest), without negative
        controls.
        """
        return {
            (r["workload"], r["tokens_digest"]): r["status"]
            for r in self.folder.records
            if r["kind"] == "gate"
            and r["plan_hash"] == self.plan["plan_hash"]
            and not r["is_negative_control"]
        }

    def all_work(self) -> list[Work]:
        return find_work(self.folder.records, self.plan["plan_hash"])

    def judge(self, work: Work) -> GateRecord:
        try:
            outputs = read_tokens(self.folder.path, work.tokens_digest)
        except GateError as error:
            return gate_record(self.plan, work, str(error))
        requests = self.requests_of(work.workload)
        if problems := check_same_work(self.plan, work, requests, outputs, self.model_dir):
            return gate_record(self.plan, work, failed_same_work(problems))
        served = self.requests_as_served(work.workload, outputs)
        results = [
            judge_outputs(
                self.rescorer(recipe),
                served,
                outputs,
                self.params,
                unknown_noise=work.unknown_noise,
                progress=Progress(str(work)).report,
            )
            for recipe in self.recipes_of(work)
        ]
        # where engines of several recipes gave the same tokens, these must be right for all of them
        return gate_record(self.plan, work, next((r for r in results if not r.passed), results[0]))

    def negative_controls(self) -> Iterator[GateRecord]:
        """A gate record for each way of breaking the reference or the tokens; all have to fail."""
        from experiments.gate.negative_controls import controls, tamper

        native = [
            work
            for work in self.all_work()
            if not work.unknown_noise and self.recipes_of(work) == [EXACT]
        ]
        if not native:
            raise GateError(
                "this folder has no valid launch of nanovllm without quantization; negative controls need tokens that it "
                "generated"
            )
        work = max(native, key=lambda work: self.plan["workloads"][work.workload]["output_tokens"])
        outputs = read_tokens(self.folder.path, work.tokens_digest)
        requests = self.requests_as_served(work.workload, outputs)
        requests, outputs = some_of(requests, outputs, self.params)
        results = {}
        shortest = min(len(request["prompt_token_ids"]) for request in requests)
        for name, mutate in controls(shortest).items():
            say(f"negative control: {name}")
            results[name] = rescore(
                self.model_dir,
                self.plan["model"]["dtype"],
                requests,
                outputs,
                self.params,
                mutate=mutate,
            )
        name, tampered = tamper(self.rescorer(), requests, outputs, self.params)
        say(f"negative control: {name}")
        results[name] = judge_outputs(self.rescorer(), requests, tampered, self.params)
        for name, result in results.items():
            reason = f"negative control, {name}: {result.reason or 'NOT CAUGHT by the gate'}"
            yield gate_record(
                self.plan, work, dataclasses.replace(result, reason=reason), negative_control=True
            )


def some_of(
    requests: list[Request], outputs: list[list[int]], params: GateParams
) -> tuple[list[Request], list[list[int]]]:
    """The first requests with at least `control_tokens` output tokens in total, which is enough for
    a negative control.
    """
    count, tokens = 0, 0
    while count < len(outputs) and tokens < params.control_tokens:
        tokens += len(outputs[count])
        count += 1
    return requests[:count], outputs[:count]


class Progress:
    """Prints the progress of a rescoring, at most every two seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.started = what, time.monotonic()
        self.said = self.started

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said >= 2 and done < total:
            self.said = now
            say(
                f"{self.what}: {done:,} of {total:,} tokens, {(now - self.started) * (total - done) / done:.0f} s left"
            )


def say(message: str) -> None:
    print(f"gate: {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--plan", type=Path, required=True, help="plan.json of the folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder with records.jsonl and tokens.jsonl"
    )
    parser.add_argument("--resume", action="store_true", help="skip outputs that have a verdict")
    parser.add_argument(
        "--negative-control",
        action="store_true",
        help="check that broken references and tokens fail",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of the plan's checkpoint, if it is elsewhere on this machine",
    )
    options = parser.parse_args(arguments)
    disable_progress_bar()  # transformers' own, while it loads weights
    try:
        plan = store.read_plan(options.plan)
        with store.Folder(options.out) as folder:
            gate = Gate(plan, folder, options.model)
            return (
                run_controls(gate) if options.negative_control else run_gate(gate, options.resume)
            )
    except (store.RecordError, GateError) as error:
        say(str(error))
        return 2


def run_gate(gate: Gate, resume: bool) -> int:
    if not gate.all_work():
        raise GateError(
            f"{gate.folder.path} has no finished launch of this plan; run experiments.launch first"
        )
    launches: Counter[str] = Counter()
    for work in gate.all_work():
        launches[work.workload] += len(work.launches)
    for work in gate.pending(resume):
        record = gate.judge(work)
        gate.folder.append(record)
        same = f"the same tokens in {len(work.launches)} of {launches[work.workload]} launches"
        say(f"{record['status']}: {work}: {same}; {describe(record)}")
    verdicts = gate.verdicts()
    missing = [work for work in gate.all_work() if verdicts[work.key] != "pass"]
    say(f"{len(gate.all_work()) - len(missing)} of {len(gate.all_work())} distinct outputs pass")
    return 1 if missing else 0


def run_controls(gate: Gate) -> int:
    caught = []
    for record in gate.negative_controls():
        gate.folder.append(record)
        caught.append(record["status"] == "fail")
        say(f"{'caught' if caught[-1] else 'NOT CAUGHT'}: {record['reason']}")
    return 0 if all(caught) else 1


def describe(record: GateRecord) -> str:
    if record["status"] == "error" or not record["tokens_checked"]:
        return str(record["reason"])
    drawn = record["calibration"].get("distribution")
    # by another generator: nothing has a margin
    if drawn and drawn["tokens"] == record["tokens_checked"]:
        judged = (
            f"sampled by its own generator, z = {drawn['z']:.2f} (limit {drawn['z_limit']:.2f})"
        )
    else:
        judged = (
            f"{record['mismatches']} differ from the reference, largest margin {record['max_margin']:.3g} logits "
            f"(bound {record['bound']:.3g})"
        )
    reason = f"; {record['reason']}" if record["reason"] else ""
    return f"{record['tokens_checked']:,} tokens, {judged}, {record['duration_s']:.1f} s{reason}"
