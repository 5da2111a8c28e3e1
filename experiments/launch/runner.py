"""Runs a plan: each launch in a fresh process, one record a launch, safe against Ctrl-C, kill -9
and power cuts.

    python -m experiments.launch --plan plan.json --out DIR [--resume] [--deadline-s N] [--blocks
    0,1]
                                 [--python vllm=/path/to/python] [--model DIR]

Needs the standard library and the engines under test only, so it runs on a bare GPU host. With
`--launch ID` the same command is the child that serves one launch (experiments/launch/engine_process.py).

Exit status: 0 all launches asked for have run (failed ones are recorded); 1 error; 75 the deadline
came first; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.engines import ENGINES
from experiments.host import environment, machine_lock, provenance, telemetry, validity
from experiments.host.model_files import ModelError, locate, state_of
from experiments.launch import fairness
from experiments.launch.fork_server import Forked, Nursery, PreloadError
from experiments.records import store
from experiments.records.ledger import Ledger, Listener, utc_now
from experiments.records.store import Record, RecordError

Plan = dict[str, Any]
Child = subprocess.Popen[bytes] | Forked
PRELOADED: dict[str, tuple[str, ...]] = {
    "nanovllm": ("torch", "nanovllm.engine.llm_engine"),
    "hf": ("torch", "nanovllm.engine.llm_engine"),
}
"""The engines whose launches may be forked, and what is imported before: the same for both, so that they share one process."""
DEADLINE_STATUS = 75  # EX_TEMPFAIL: run the same command again

_GPUS = "CUDA_VISIBLE_DEVICES"


class Runner:
    """Executes launches of one plan into one folder. Use it as a context manager; folder and
    machine are locked meanwhile.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        resume: bool,
        pythons: dict[str, str] | None = None,
        model: str | None = None,
        listener: Listener | None = None,
        earlier: dict[str, int] | None = None,
    ) -> None:
        """pythons: interpreters by engine, this one where absent. model: where the plan's
        checkpoint lies on this machine.
        earlier: attempts by launch that are recorded elsewhere.

        Raises RecordError where `out` holds other records, or holds some and `resume` is not given,
        where an interpreter is absent, and where another runner measures on this machine;
        FairnessError; ModelError.
        """
        self.plan, self.out = plan, out
        self.pythons = pythons or {}
        self.earlier = earlier or {}
        for engine, python in self.pythons.items():
            if shutil.which(python) is None:
                raise RecordError(f"--python {engine}={python}: no such program on this machine")
        self.boot_id = provenance.boot_id()
        self.machine = provenance.of_machine()
        self._environments: dict[str, str | None] = {}
        self._nursery: tuple[int, Nursery] | None = None
        self.ledger = Ledger(
            plan, out, self.machine["code_digest"], resume=resume, listener=listener
        )
        self.listener = self.ledger.listener
        self._machine = contextlib.ExitStack()
        try:
            self._machine.enter_context(machine_lock.held(plan, out))
            fairness.check_plan(plan)
            fairness.check_launches(plan, self.ledger.folder.records)
            self.model = locate(
                {**plan["model"], "preset": None, "path": model} if model else plan["model"]
            )
            self._model_state = state_of(self.model)
            self.machine["model_files"] = digests_of(self.model)
            self._check_model_files()
            if resume and self.ledger.folder.records:
                self._mark_resumed()
            self.listener("pending", {"launches": self.pending()})
        except BaseException:
            self.__exit__()
            raise

    def _check_model_files(self) -> None:
        """Raises RecordError where what is recorded was made with other files beside the weights,
        which the plan has digested.
        """
        for record in store.launches(self.ledger.folder.records):
            then = record["provenance"].get("model_files", self.machine["model_files"])
            if changed := sorted(
                name
                for name, digest in self.machine["model_files"].items()
                if then.get(name) != digest
            ):
                raise RecordError(
                    f"{self.model / changed[0]} is not the file that {record['launch']} was made with: restore it, or start again "
                    "with another --out"
                )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._nursery is not None:
            self._nursery[1].close()
            self._nursery = None
        self._machine.close()
        self.ledger.close()

    def pending(self, blocks: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """The launches without a finished record, in plan order."""
        return self.ledger.pending(blocks)

    def run(self, blocks: Iterable[int] | None = None, deadline: float | None = None) -> bool:
        """Runs what is pending. deadline: a time.monotonic() by which the last launch should have
        ended. True: all ran.
        """
        for entry in self.pending(blocks):
            if (
                deadline is not None
                and time.monotonic() + self.ledger.expected_launch_s(entry["cell"]) > deadline
            ):
                self.listener(
                    "message",
                    {
                        "text": f"stopped before {entry['launch']}: it would not end before the deadline"
                    },
                )
                return False
            self.run_launch(entry)
        return True

    def run_launch(self, entry: dict[str, Any]) -> Record:
        """Runs one launch and appends its record. Ctrl-C ends the child and leaves no record: the
        launch runs again.

        Raises RecordError if the code or the checkpoint has changed since the run began, or nothing
        can be written; FairnessError if launches that are to be compared turn out to be no
        comparison.
        """
        if provenance.code_digest() != self.machine["code_digest"]:
            raise RecordError(
                f"the engine's code has changed since this run began: {entry['launch']} would measure another program. What is "
                f"recorded in {self.out} is kept; start again with another --out, or restore the code and resume."
            )
        if state_of(self.model) != self._model_state:
            raise RecordError(
                f"the checkpoint in {self.model} has changed since this run began: {entry['launch']} would serve other weights. "
                "What is recorded is kept; restore the checkpoint and resume."
            )
        attempt = 1 + self.earlier.get(entry["launch"], 0) + self.ledger.attempts(entry["launch"])
        cell = self.plan["cells"][entry["cell"]]
        record: Record = {
            "kind": "launch",
            **self.ledger.head,
            "launch": entry["launch"],
            "block": entry["block"],
            "order": entry["order"],
            "cell": entry["cell"],
            "attempt": attempt,
            "seed": entry["seed"],
            "boot_id": self.boot_id,
            "started_at": utc_now(),
            "status": "failed",
            "reason": None,
            "engine": cell["engine"],
            "requested": cell["config"],
            "resolved": {},
            "process_start_s": None,
            "load_s": None,
            "warm_up_s": None,
            "total_s": None,
            "workloads": {},
            "toggles": {},
        }
        nursery = self._nursery_for(entry["block"], cell["engine"])
        report = self._environment_report(cell["engine"])
        expected_s = self.ledger.expected_launch_s(entry["cell"])
        self.listener("start", {"launch": entry, "attempt": attempt, "expected_s": expected_s})
        measurement = self.plan["study"]["measurement"]
        scratch = self.out / store.LOGS / f"{entry['launch']}.a{attempt}"
        try:
            if nursery is not None:
                record["preloaded_s"] = nursery.import_s
            begin = time.monotonic()
            command = self._command(entry, attempt)
            outcome = run_child(
                command, scratch, measurement["timeout_s"], measurement["environment"], nursery
            )
        except (OSError, PreloadError, subprocess.TimeoutExpired) as error:
            raise RecordError(f"{entry['launch']}: {error}. {store.INTACT}") from error
        interpreter = outcome["record"].pop("provenance", {})
        record |= outcome["record"]
        broken = validity.objections(outcome["telemetry"], self.plan["study"].get("validity"))
        if broken and record["status"] in store.DONE:
            record |= {
                "status": "invalid",
                "reason": "; ".join(filter(None, [record["reason"], *broken])),
            }
        record |= {
            "total_s": time.monotonic() - begin,
            "peak_memory_bytes": outcome["peak_memory_bytes"],
            "telemetry": outcome["telemetry"],
            "provenance": self.machine | interpreter | {"collect_env": report},
        }
        self.ledger.folder.append(record, outcome["tokens"])
        self.listener("end", {"launch": entry, "record": record, "tokens": outcome["tokens"]})
        fairness.check_launches(self.plan, self.ledger.folder.records)
        return record

    def _nursery_for(self, block: int, engine: str) -> Nursery | None:
        """What a launch of a block is forked from, where the plan asks for that; None for an engine
        that is started afresh: one with an interpreter of its own, or that is not known to be safe
        to fork.
        """
        measurement = self.plan["study"]["measurement"]
        modules = PRELOADED.get(engine)
        if (
            not measurement.get("preload")
            or modules is None
            or self.pythons.get(engine, sys.executable) != sys.executable
        ):
            return None
        if self._nursery is None or self._nursery[0] != block:
            if self._nursery is not None:
                self._nursery[1].close()
            log = self.out / store.LOGS / f"preload-b{block:02d}.log"
            self._nursery = (
                block,
                Nursery(
                    sys.executable, environment.of_child(measurement["environment"]), modules, log
                ),
            )
        return self._nursery[1]

    def _environment_report(self, engine: str) -> str | None:
        """The name of the file in the folder that holds torch's report on the environment of an
        engine's interpreter.
        """
        python = self.pythons.get(engine, sys.executable)
        if python not in self._environments:
            self._environments[python] = (
                provenance.collect_env(python, self.out) if engine in ENGINES else None
            )
        return self._environments[python]

    def _command(self, entry: dict[str, Any], attempt: int) -> list[str]:
        engine = self.plan["cells"][entry["cell"]]["engine"]
        return [
            self.pythons.get(engine, sys.executable),
            "-m",
            "experiments.launch",
            "--plan",
            str(self.out / store.PLAN),
            "--launch",
            entry["launch"],
            "--attempt",
            str(attempt),
            "--model",
            str(self.model),
        ]

    def _mark_resumed(self) -> None:
        """Blocks that were left unfinished elsewhere begin again: a pair never straddles two boots,
        or two GPUs of one host.
        """
        variables = os.environ | self.plan["study"]["measurement"]["environment"]

        def elsewhere(record: Record) -> bool:
            # absent where the launch failed before it could tell
            then = record["provenance"].get("environment")
            other_gpu = then is not None and then.get(_GPUS) != variables.get(_GPUS)
            return record["boot_id"] != self.boot_id or other_gpu

        for block in sorted({entry["block"] for entry in self.pending()}):
            places = {
                r["boot_id"]
                for r in store.launches(self.ledger.folder.records)
                if r["block"] == block and elsewhere(r)
            }
            reason = f"block {block} was not finished on boot {', '.join(sorted(places))}; it begins again on {self.boot_id}"
            self.ledger.supersede(block, reason, elsewhere)
        self.ledger.note_resumed(self.boot_id)


def digests_of(model: Path) -> dict[str, str | None]:
    """SHA-256 of a checkpoint's files that shape prompts and answers, and that the digest of config
    and weights leaves out.
    """
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    )
    files = {name: model / name for name in names}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        for name, file in files.items()
    }


def run_child(
    command: list[str],
    scratch: Path,
    timeout_s: float,
    variables: dict[str, str],
    nursery: Nursery | None = None,
) -> dict[str, Any]:
    """Runs a child to its end: {"record", "tokens", "peak_memory_bytes", "telemetry"}. A child that
    fails or hangs is a record of status `failed` that ends with what it last printed; its output is
    then kept in `scratch`.log.

    command: [python, "-m", "experiments.launch", ...]; with a nursery the child is forked from it.
    Raises OSError, PreloadError.
    """
    result, log = (
        scratch.with_name(scratch.name + ".result"),
        scratch.with_name(scratch.name + ".log"),
    )
    # GPUs before the child
    sampler = telemetry.Sampler(
        os.getpid(), visible=(os.environ | variables).get("CUDA_VISIBLE_DEVICES")
    )
    arguments = ["--result", str(result), "--spawned-at", repr(time.time())]
    child: Child
    if nursery is None:
        with log.open("wb") as output:
            child = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment.of_child(variables),
            )
    else:
        log.write_bytes(b"")
        child = nursery.start([*command[3:], *arguments], log)
    sampler.pid = child.pid
    sampler.start()
    problem = None
    try:
        status = child.wait(timeout=timeout_s)
        if status != 0:
            problem = (
                f"killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exit status {status}"
            )
            problem += " (out of memory?)" if status == -signal.SIGKILL else ""
    except subprocess.TimeoutExpired:
        problem = f"no result after {timeout_s:g} s (measurement.timeout_s); killed"
    finally:
        kill_group(child)
        seen = sampler.stop()
    failure: Record = {"status": "failed", "reason": None}
    outcome: dict[str, Any] = {
        "record": failure,
        "tokens": {},
        "peak_memory_bytes": {"host": sampler.peak_host_bytes, "device": sampler.peak_device_bytes},
        "telemetry": seen,
    }
    if problem is None and not result.exists():
        problem = "ended without a result"
    if problem is None:
        outcome |= store.read_json(result)
        log.unlink()
    else:
        failure["reason"] = (
            f"{problem}; its output ends with: {tail(log)} (all of it: {store.LOGS}/{log.name})"
        )
    for leftover in (result, result.with_name(result.name + ".partial")):
        leftover.unlink(missing_ok=True)
    return outcome


def kill_group(child: Child) -> None:
    """Ends a child and all its workers, and waits for it."""
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended already
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin:
        child.stdin.close()


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, at most 2,000 characters; before them its first error, which an
    engine of several processes often buries under the errors that follow from it.
    """
    every = log.read_text(errors="replace").strip().splitlines()
    end = "\n".join(every[-lines:])[-2000:]
    errors = (
        line.strip()
        for line in every[:-lines]
        if re.search(r"\w(Error|Exception): ", line) and "WARN" not in line
    )
    first = next(errors, None)
    return f"{first[:500]}\n[...]\n{end}" if first else end


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.launch", description="Run the launches of a plan."
    )
    parser.add_argument(
        "--plan",
        type=Path,
        required=True,
        help="plan.json, made by `python -m experiments run --dry-run --write-plan`",
    )
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument(
        "--resume", action="store_true", help="go on where an earlier run into this folder stopped"
    )
    parser.add_argument(
        "--deadline-s",
        type=float,
        help="start no launch that would not end within this many seconds",
    )
    parser.add_argument("--blocks", type=block_numbers, help="only these blocks, e.g. 0,1")
    parser.add_argument(
        "--python",
        type=engine_python,
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="interpreter of an engine",
    )
    parser.add_argument(
        "--model", help="folder of the plan's checkpoint, where it lies elsewhere on this machine"
    )
    child = parser.add_argument_group("one launch (used by the runner itself)")
    child.add_argument("--launch", help=argparse.SUPPRESS)
    child.add_argument("--attempt", type=int, help=argparse.SUPPRESS)
    child.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    child.add_argument("--spawned-at", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        plan = store.read_plan(given.plan)
        if given.launch:
            from experiments.launch import engine_process as one_launch

            one_launch.main(plan, given.launch, given.model, given.spawned_at, given.result)
            return 0
        if given.out is None:
            parser.error("--out is required")
        known = {entry["block"] for entry in plan["launches"]}
        if unknown := sorted(set(given.blocks or []) - known):
            raise RecordError(
                f"--blocks: {given.plan} has no block {unknown[0]}; allowed: {', '.join(map(str, sorted(known)))}"
            )
        deadline = None if given.deadline_s is None else begin + given.deadline_s
        pythons = dict(given.python)
        with Runner(
            plan,
            given.out,
            resume=given.resume,
            pythons=pythons,
            model=given.model,
            listener=print_event,
        ) as runner:
            finished = runner.run(given.blocks, deadline)
        say_what_to_carry(given.out)
    except (RecordError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nstopped; finished launches are in {given.out}. Go on with the same command and --resume.",
            file=sys.stderr,
        )
        return 130
    return 0 if finished else DEADLINE_STATUS


def block_numbers(text: str) -> list[int]:
    """`0,1` as argparse wants it."""
    parts = text.split(",")
    if wrong := [part for part in parts if not part.strip().isdecimal()]:
        raise argparse.ArgumentTypeError(
            f"{wrong[0]!r} is no block; write their numbers, separated by commas, e.g. 0,1"
        )
    return [int(part) for part in parts]


def engine_python(text: str) -> tuple[str, str]:
    """`vllm=/path/to/python` as argparse wants it."""
    engine, is_there, python = text.partition("=")
    if not (engine and is_there and python):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write ENGINE=PATH, e.g. vllm=.venv-vllm/bin/python"
        )
    return engine, python


def say_what_to_carry(out: Path) -> None:
    """The records are enough for a report; the tokens are for a gate that has not been run here."""
    sizes = {
        name: (out / name).stat().st_size / 1e6
        for name in (store.PLAN, store.RECORDS, store.TOKENS)
    }
    print(
        f"{out}: " + ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()),
        file=sys.stderr,
        flush=True,
    )


def print_event(event: str, details: dict[str, Any]) -> None:
    """The progress of a run without a terminal library."""
    if event == "message":
        print(details["text"], file=sys.stderr, flush=True)
    elif event == "end":
        record = details["record"]
        times = ", ".join(
            f"{name} {work['duration_s']:.2f} s" for name, work in record["workloads"].items()
        )
        print(
            f"{record['launch']}: {record['status']} in {record['total_s']:.1f} s ({times or record['reason']})",
            flush=True,
        )
