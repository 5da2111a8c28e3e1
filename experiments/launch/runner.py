"""Runs a plan: one fresh engine process and one record per launch. Survives Ctrl-C, kill -9 and
power cuts.

    python -m experiments.launch --plan plan.json --out DIR [--resume] [--deadline-s N] [--blocks
    0,1]
                                 [--python vllm=/path/to/python] [--model DIR]

Needs only the standard library and the engines under test, so it runs on a bare GPU host. With
`--launch ID` the same command is the engine process of one launch
(experiments/launch/engine_process.py).

Exit status: 0 all requested launches have run (failed ones are recorded); 1 error; 75 stopped at
the deadline; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from experiments.engines import ENGINES, library
from experiments.host import environment, machine_lock, provenance, telemetry, validity
from experiments.host.model_files import ModelError, locate, state_of
from experiments.launch import fairness
from experiments.launch.fork_server import Forked, ForkServer, ForkServerError
from experiments.records import store
from experiments.records.cell_names import shown_names
from experiments.records.ledger import Ledger, Listener, utc_now
from experiments.records.store import RecordError
from experiments.records.types import (
    Event,
    LaunchEntry,
    LaunchOutcome,
    LaunchRecord,
    LaunchResult,
    Measured,
    Plan,
)

EngineProcess = subprocess.Popen[bytes] | Forked
FORK_SERVER_MODULES: dict[str, tuple[str, ...]] = {
    "nanovllm": ("torch", "nanovllm.engine.llm_engine"),
    "hf": ("torch", "nanovllm.engine.llm_engine"),
}
"""The engines that may run in forks of a fork server, and the modules it imports: the same for both, so that they share one."""
DEADLINE_STATUS = 75  # EX_TEMPFAIL: run the same command again

_GPUS = "CUDA_VISIBLE_DEVICES"


class Runner:
    """Runs launches of a plan and records them in a folder. A context manager that locks folder and
    machine.
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
        """pythons: interpreters by engine; the default is this one. model: the folder of the plan's
        checkpoint on this machine. earlier: number of attempts recorded elsewhere, by launch.

        Raises RecordError if `out` holds other records, or any without `resume`, if an interpreter
        does not exist, or if another runner is measuring on this machine; FairnessError;
        ModelError.
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
        self._fork_server: tuple[int, ForkServer] | None = None
        self.ledger = Ledger(
            plan, out, self.machine["code_digest"], resume=resume, listener=listener
        )
        self.listener = self.ledger.listener
        self._machine = contextlib.ExitStack()
        try:
            self._machine.enter_context(machine_lock.held(plan, out))
            fairness.check_plan(plan)
            fairness.check_launches(plan, self.ledger.folder.records)
            planned = plan["model"]
            if model:
                planned = {**planned, "preset": None, "path": model}
            self.model = locate(planned)
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
        """Raises RecordError if earlier launches used other tokenizer or generation files. (The
        plan's digest covers config and weights.)
        """
        for record in store.launches(self.ledger.folder.records):
            then = record["provenance"].get("model_files", self.machine["model_files"])
            if changed := sorted(
                name
                for name, digest in self.machine["model_files"].items()
                if then.get(name) != digest
            ):
                raise RecordError(
                    f"{self.model / changed[0]} has changed since {record['launch']} ran: restore it, or start again with another "
                    "--out"
                )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fork_server is not None:
            self._fork_server[1].close()
            self._fork_server = None
        self._machine.close()
        self.ledger.close()

    def pending(self, blocks: Iterable[int] | None = None) -> list[LaunchEntry]:
        """The launches without a finished record, in plan order."""
        return self.ledger.pending(blocks)

    def run(self, blocks: Iterable[int] | None = None, deadline: float | None = None) -> bool:
        """Runs pending launches. Starts none that is expected to end after `deadline`, a value of
        time.monotonic(). True if all ran.
        """
        for entry in self.pending(blocks):
            if (
                deadline is not None
                and time.monotonic() + self.ledger.expected_launch_s(entry["cell"]) > deadline
            ):
                self.listener(
                    "message",
                    {
                        "text": f"stopped before {entry['launch']}, which would not finish before the deadline"
                    },
                )
                return False
            self.run_launch(entry)
        return True

    def run_launch(self, entry: LaunchEntry) -> LaunchRecord:
        """Runs one launch and appends its record. Ctrl-C ends the engine process and leaves no
        record, so the launch will run again.

        Raises RecordError if the code or the checkpoint has changed since the run began, or if the
        record cannot be written; FairnessError if launches that are to be compared differ in what
        they must share.
        """
        if provenance.code_digest() != self.machine["code_digest"]:
            raise RecordError(
                f"the engine's code has changed since this run began, so {entry['launch']} would measure different code. Restore "
                f"the code and resume, or start again with another --out. The records in {self.out} are kept."
            )
        if state_of(self.model) != self._model_state:
            raise RecordError(
                f"the checkpoint in {self.model} has changed since this run began. Restore it and resume; the records are kept."
            )
        attempt = 1 + self.earlier.get(entry["launch"], 0) + self.ledger.attempts(entry["launch"])
        cell = self.plan["cells"][entry["cell"]]
        started_at = utc_now()
        fork_server = self._fork_server_for(entry["block"], cell["engine"])
        report = self._environment_report(cell["engine"])
        expected_s = self.ledger.expected_launch_s(entry["cell"])
        self.listener("start", {"launch": entry, "attempt": attempt, "expected_s": expected_s})
        measurement = self.plan["study"]["measurement"]
        scratch = self.out / store.LOGS / f"{entry['launch']}.a{attempt}"
        try:
            import_s = None if fork_server is None else fork_server.import_s
            begin = time.monotonic()
            command = self._command(entry, attempt)
            outcome = run_engine_process(
                command, scratch, measurement["timeout_s"], measurement["environment"], fork_server
            )
        except (OSError, ForkServerError, subprocess.TimeoutExpired) as error:
            raise RecordError(f"{entry['launch']}: {error}. {store.INTACT}") from error
        total_s = time.monotonic() - begin
        measured = outcome["record"]
        status, reason = measured["status"], measured["reason"]
        broken = validity.objections(outcome["telemetry"], self.plan["study"].get("validity"))
        if broken and status in store.DONE:
            status, reason = "invalid", "; ".join(filter(None, [reason, *broken]))
        record: LaunchRecord = {
            "kind": "launch",
            **self.ledger.head,
            "launch": entry["launch"],
            "block": entry["block"],
            "order": entry["order"],
            "cell": entry["cell"],
            "attempt": attempt,
            "seed": entry["seed"],
            "boot_id": self.boot_id,
            "started_at": started_at,
            "status": status,
            "reason": reason,
            "engine": cell["engine"],
            "requested": cell["config"],
            "resolved": measured.get("resolved", {}),
            "process_start_s": measured.get("process_start_s"),
            "load_s": measured.get("load_s"),
            "warm_up_s": measured.get("warm_up_s"),
            "total_s": total_s,
            "workloads": measured.get("workloads", {}),
            "toggles": measured.get("toggles", {}),
            "peak_memory_bytes": outcome["peak_memory_bytes"],
            "telemetry": outcome["telemetry"],
            "provenance": {**self.machine, "collect_env": report},
        }
        if "provenance" in measured:
            record["provenance"].update(measured["provenance"])
        if import_s is not None:
            record["preloaded_s"] = import_s
        self.ledger.folder.append(record, outcome["tokens"])
        self.listener("end", {"launch": entry, "record": record, "tokens": outcome["tokens"]})
        fairness.check_launches(self.plan, self.ledger.folder.records)
        return record

    def _fork_server_for(self, block: int, engine: str) -> ForkServer | None:
        """The fork server of a block, if the plan asks for one. None for an engine that has another
        interpreter or is not known to be safe to fork.
        """
        measurement = self.plan["study"]["measurement"]
        modules = FORK_SERVER_MODULES.get(engine)
        if (
            not measurement.get("preload")
            or modules is None
            or self._python(engine) != sys.executable
        ):
            return None
        if self._fork_server is None or self._fork_server[0] != block:
            if self._fork_server is not None:
                self._fork_server[1].close()
            log = self.out / store.LOGS / f"fork-server-b{block:02d}.log"
            self._fork_server = (
                block,
                ForkServer(
                    sys.executable,
                    environment.for_subprocess(measurement["environment"]),
                    modules,
                    log,
                ),
            )
        return self._fork_server[1]

    def _python(self, engine: str) -> str:
        """The interpreter of an engine: as given for it, or for its library, or this one."""
        return self.pythons.get(engine) or self.pythons.get(library(engine)) or sys.executable

    def _environment_report(self, engine: str) -> str | None:
        """The file with torch's report on the environment of an engine's interpreter, by name."""
        python = self._python(engine)
        if python not in self._environments:
            self._environments[python] = (
                provenance.collect_env(python, self.out) if engine in ENGINES else None
            )
        return self._environments[python]

    def _command(self, entry: LaunchEntry, attempt: int) -> list[str]:
        engine = self.plan["cells"][entry["cell"]]["engine"]
        return [
            self._python(engine),
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
        """Restarts blocks that were interrupted on another boot or GPU: launches are only compared
        within one.
        """
        variables = os.environ | self.plan["study"]["measurement"]["environment"]

        def elsewhere(record: LaunchRecord) -> bool:
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
            reason = f"block {block} was not finished on boot {', '.join(sorted(places))}; it is restarted on {self.boot_id}"
            self.ledger.supersede(block, reason, elsewhere)
        self.ledger.note_resumed(self.boot_id)


def digests_of(model: Path) -> dict[str, str | None]:
    """SHA-256 of a checkpoint's tokenizer and generation files, which the digest of config and
    weights does not cover.
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


def run_engine_process(
    command: list[str],
    scratch: Path,
    timeout_s: float,
    variables: dict[str, str],
    fork_server: ForkServer | None = None,
) -> LaunchOutcome:
    """Runs an engine process to its end and collects its result and telemetry. If it fails or hangs,
    the record has status `failed` and the end of its output, which is kept in `scratch`.log.

    command: [python, "-m", "experiments.launch", ...]. With a fork server, the process is forked
    from it. Raises OSError, ForkServerError.
    """
    result, log = (
        scratch.with_name(scratch.name + ".result"),
        scratch.with_name(scratch.name + ".log"),
    )
    # samples the GPUs before the process starts
    sampler = telemetry.Sampler(
        os.getpid(), visible=(os.environ | variables).get("CUDA_VISIBLE_DEVICES")
    )
    arguments = ["--result", str(result), "--spawned-at", repr(time.time())]
    process: EngineProcess
    if fork_server is None:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment.for_subprocess(variables),
            )
    else:
        log.write_bytes(b"")
        process = fork_server.start([*command[3:], *arguments], log)
    sampler.pid = process.pid
    sampler.start()
    problem = None
    try:
        status = process.wait(timeout=timeout_s)
        if status != 0:
            problem = (
                f"killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exit status {status}"
            )
            problem += " (out of memory?)" if status == -signal.SIGKILL else ""
    except subprocess.TimeoutExpired:
        problem = f"killed after {timeout_s:g} s without a result (measurement.timeout_s)"
    finally:
        kill_group(process)
        seen = sampler.stop()
    failure: Measured = {"status": "failed", "reason": None}
    outcome: LaunchOutcome = {
        "record": failure,
        "tokens": {},
        "peak_memory_bytes": {"host": sampler.peak_host_bytes, "device": sampler.peak_device_bytes},
        "telemetry": seen,
    }
    if problem is None and not result.exists():
        problem = "ended without a result"
    if problem is None:
        answer: LaunchResult = json.loads(result.read_text())
        outcome["record"], outcome["tokens"] = answer["record"], answer["tokens"]
        log.unlink()
    else:
        failure["reason"] = (
            f"{problem}; its output ends with: {tail(log)} (all of it: {store.LOGS}/{log.name})"
        )
    for leftover in (result, result.with_name(result.name + ".partial")):
        leftover.unlink(missing_ok=True)
    return outcome


def kill_group(process: EngineProcess) -> None:
    """Kills a process and its process group, and waits for it."""
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, at most 2,000 characters. If an earlier line is an error, it comes
    first: with several processes, the cause is often buried under errors that follow from it.
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
        prog="python -m experiments.launch",
        description="Run the launches of a plan, one engine process each.",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        required=True,
        help="plan.json, written by `python -m experiments run --dry-run --write-plan`",
    )
    parser.add_argument("--out", type=Path, help="output folder for the records")
    parser.add_argument(
        "--resume", action="store_true", help="continue an earlier run in this folder"
    )
    parser.add_argument(
        "--deadline-s",
        type=float,
        help="skip launches not expected to finish within this many seconds",
    )
    parser.add_argument("--blocks", type=block_numbers, help="run only these blocks, e.g. 0,1")
    parser.add_argument(
        "--python",
        type=engine_python,
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="Python interpreter for an engine",
    )
    parser.add_argument(
        "--model", help="folder of the plan's checkpoint, if it is elsewhere on this machine"
    )
    internal = parser.add_argument_group("one launch (used by the runner itself)")
    internal.add_argument("--launch", help=argparse.SUPPRESS)
    internal.add_argument("--attempt", type=int, help=argparse.SUPPRESS)
    internal.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    internal.add_argument("--spawned-at", type=float, help=argparse.SUPPRESS)
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
            listener=partial(print_event, names=shown_names(plan)),
        ) as runner:
            finished = runner.run(given.blocks, deadline)
        say_what_to_carry(given.out)
    except (RecordError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nstopped; finished launches are in {given.out}. Run the same command with --resume to continue.",
            file=sys.stderr,
        )
        return 130
    return 0 if finished else DEADLINE_STATUS


def block_numbers(text: str) -> list[int]:
    """Parses `0,1` for argparse."""
    parts = text.split(",")
    if wrong := [part for part in parts if not part.strip().isdecimal()]:
        raise argparse.ArgumentTypeError(
            f"{wrong[0]!r} is not a block number; write numbers separated by commas, e.g. 0,1"
        )
    return [int(part) for part in parts]


def engine_python(text: str) -> tuple[str, str]:
    """Parses `vllm=/path/to/python` for argparse."""
    engine, is_there, python = text.partition("=")
    if not (engine and is_there and python):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write ENGINE=PATH, e.g. vllm=.venv-vllm/bin/python"
        )
    return engine, python


def say_what_to_carry(out: Path) -> None:
    """Prints the size of the files to copy home. A report needs only the records; the tokens are
    needed if the gate has not run here.
    """
    sizes = {
        name: (out / name).stat().st_size / 1e6
        for name in (store.PLAN, store.RECORDS, store.TOKENS)
    }
    print(
        f"{out}: " + ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()),
        file=sys.stderr,
        flush=True,
    )


def print_event(event: str, details: Event, names: Mapping[str, str] | None = None) -> None:
    """Prints the progress of a run, without a terminal library. names: {cell: what it is called}."""
    if event == "message":
        print(details["text"], file=sys.stderr, flush=True)
    elif event == "end":
        record = details["record"]
        times = ", ".join(
            f"{name} {work['duration_s']:.2f} s" for name, work in record["workloads"].items()
        )
        launch = f"block {record['block']}, {(names or {}).get(record['cell'], record['cell'])}"
        print(
            f"{launch}: {record['status']} in {record['total_s']:.1f} s ({times or record['reason']})",
            flush=True,
        )
