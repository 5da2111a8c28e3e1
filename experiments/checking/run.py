"""Runs a check: draws the workloads, runs every job in its own process (several at a time), judges
the outputs, and writes the page.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.checking import page, work
from experiments.checking.jobs import Job, Scope, all_jobs, control_workloads
from experiments.checking.results import CheckResult, NamedModel
from experiments.host import model_files, provenance
from experiments.host.environment import for_subprocess
from experiments.host.telemetry import gpu_inventory
from experiments.launch.runner import kill_group, tail
from experiments.records.types import Device

TIMEOUT_S = 900


class CheckError(Exception):
    """A check that could not be completed; the message says what to do."""


def run(
    folder: Path,
    model: NamedModel,
    scope: Scope,
    drawn: int,
    pythons: dict[str, str],
    console: Console,
) -> bool:
    """Runs a check and writes folder/check.{json,md,html}. True if every verdict is the expected
    one. Raises CheckError if the gate itself fails.
    """
    begin = time.monotonic()
    (folder / "served").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    vocab_size = scope.shape["vocab_size"]
    console.print(f"drawing {drawn} workloads", highlight=False)
    workloads = work.draw(drawn, vocab_size)
    names = list(workloads)
    workloads |= control_workloads(vocab_size)
    work.write(workloads, folder / "work.json")
    jobs, absent = all_jobs(scope, names)
    (folder / "jobs.json").write_text(json.dumps([job.as_dict() for job in jobs], indent=1) + "\n")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        serve_all(jobs, folder, model["path"], scope, pythons, console, progress)
        judge_all(folder, model["path"], progress)
    verdicts = json.loads((folder / "verdicts.json").read_text())
    result: CheckResult = {
        "model": model,
        "device": scope.device,
        "hardware": hardware_of(scope.device),
        "workloads": {"drawn": len(names), "requests": sum(map(len, workloads.values()))},
        "absent": absent,
        "duration_s": time.monotonic() - begin,
        "lines": verdicts["lines"],
        "noise": verdicts["noise"],
        "good": False,
    }
    result["good"] = all(line["good"] for line in result["lines"])
    (folder / "check.json").write_text(json.dumps(result, indent=1) + "\n")
    page.write(result, folder)
    page.show(result, console)
    return bool(result["good"])


def serve_all(
    jobs: list[Job],
    folder: Path,
    model: str,
    scope: Scope,
    pythons: dict[str, str],
    console: Console,
    progress: Progress,
) -> None:
    """Runs all jobs. A job that fails is recorded as an error, with the end of its output.

    Engines that take part of a GPU for themselves (vLLM) run alone, after the others. An exception,
    Ctrl-C included, ends the jobs that run and drops those that wait.
    """
    task = progress.add_task("serving", total=len(jobs))
    running = Running()

    def serve(numbered: Iterable[tuple[int, Job]], at_once: int) -> None:
        pool = ThreadPoolExecutor(at_once)
        futures = {
            pool.submit(
                serve_one, i, job, folder, model, pythons.get(job.engine, sys.executable), running
            ): job
            for i, job in numbered
        }
        try:
            for future in as_completed(futures):
                error = future.result()
                progress.update(task, advance=1, description=futures[future].name[:40])
                if error or not console.is_terminal:
                    console.print(
                        f"done     {futures[future].name}{': ' + error if error else ''}",
                        markup=False,
                        highlight=False,
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise
        finally:
            pool.shutdown()

    alone = [(i, job) for i, job in enumerate(jobs) if job.engine in scope.peers]
    together = [(i, job) for i, job in enumerate(jobs) if job.engine not in scope.peers]
    serve(together, jobs_at_once(scope.device))
    serve(alone, 1 if scope.device == "cuda" else jobs_at_once(scope.device))


class Running:
    """The processes of the jobs that run, for threads that start them and one that stops them all."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """One more process; it is killed at once if everything was stopped while it started."""
        self.processes.add(process)
        if self.stopped.is_set():
            kill_group(process)

    def discard(self, process: subprocess.Popen[bytes]) -> None:
        self.processes.discard(process)

    def stop(self) -> None:
        self.stopped.set()
        for process in list(self.processes):
            kill_group(process)


def jobs_at_once(device: Device) -> int:
    """How many jobs run side by side: two on a CPU; on a GPU, whose jobs mostly start and compile,
    one for every four cores, at most four: on one H200 with 16 cores the whole check then took 4 minutes,
    where one job after the other had not ended after 520 s. Never more than there are cores.
    """
    cores = provenance.cpu_cores()
    return max(1, min(4, cores // 4) if device == "cuda" else min(2, cores))


def serve_one(
    number: int,
    job: Job,
    folder: Path,
    model: str,
    python: str,
    running: Running,
) -> str | None:
    """Runs one job to its end. Returns the error, if there was one. `running` has the job's process
    while it runs.
    """
    out, log = folder / "served" / f"{number:02d}.json", folder / "logs" / f"{number:02d}.log"
    file = folder / "logs" / f"{number:02d}.job.json"
    file.write_text(json.dumps(job.as_dict()))
    command = [
        python,
        "-m",
        "experiments.checking.serve",
        "--job",
        str(file),
        "--work",
        str(folder / "work.json"),
        "--model",
        model,
        "--out",
        str(out),
    ]
    error = None
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(),
        )
        running.add(process)
        try:
            status = process.wait(timeout=TIMEOUT_S)
            if status != 0:
                error = f"exit status {status}"
        except subprocess.TimeoutExpired:
            error = f"not finished after {TIMEOUT_S} s"
        finally:
            running.discard(process)
            kill_group(process)
    if error is None and not out.exists():
        error = "ended without a result"
    if error is not None:
        error = f"{error}: {tail(log, 3)} (full log: logs/{log.name})"
        out.write_text(json.dumps({"job": job.name, "error": error}))
    return error


def judge_all(folder: Path, model: str, progress: Progress) -> None:
    task = progress.add_task("the gate", total=None)
    log = folder / "logs" / "judging.log"
    command = [
        sys.executable,
        "-m",
        "experiments.checking.judging",
        "--folder",
        str(folder),
        "--model",
        model,
    ]
    with log.open("w") as output:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=output, text=True, env=environment()
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith("progress "):
                        done, total = map(int, line.split()[1:])
                        progress.update(task, completed=done, total=total)
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            raise CheckError(
                f"the gate exited with status {process.returncode}: {tail(log, 6)} (full log: {log})"
            )


def environment() -> dict[str, str]:
    """One thread per process, which is best for small models."""
    return for_subprocess({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})


def find_model(preset: str | None, path: str | None) -> NamedModel:
    """The model of a check, by preset or folder. Raises ModelError."""
    found = model_files.inspect(preset, path)
    return {"name": preset or path or "", "path": found["path"], "digest": found["digest"]}


def hardware_of(device: str) -> str:
    """The hardware that a check ran on: the GPUs of this process, or the CPU."""
    if device != "cuda":
        return provenance.cpu_model()
    names = [gpu["name"] for gpu in gpu_inventory()]
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items()) or "GPU"
