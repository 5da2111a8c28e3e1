"""Runs the mutants: some processes side by side, each with one mutant and the tests that reach it, in
an order drawn by a seed that takes a mutant of each room in turn. So whenever it ends, what was tried
is a fair sample of every room.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from property_tests.mutants import results
from property_tests.mutants.baseline import TimedFile, chosen_tests
from property_tests.mutants.operators import Mutant
from property_tests.mutants.results import KILLED, SURVIVED, Line
from property_tests.mutants.rooms import ROOMS, ROOT, Room, all_modules, files_of_tests, room_of
from property_tests.mutants.worker import Task, work

LONGEST_TEST_S, LONGEST_FILE_S = 60.0, 420.0
"""Without a mutant. What takes longer is left out."""
GRACE_S = 45.0
"""What is running when the time is up may take as long; then it is dropped, and tried next time."""


@dataclass(frozen=True)
class Settings:
    jobs: int
    minutes: float
    seed: int
    count: int | None
    budget_s: float
    results: Path
    modules: tuple[str, ...] = ()
    again: bool = False
    """Only those that survived, once more."""
    tests: tuple[str, ...] = ()
    """Only the tests of these files; then a mutant that survives them is not noted."""

    def tests_of(self, room: Room) -> tuple[str, ...]:
        return tuple(file for file in room.tests if not self.tests or file in self.tests)


@dataclass
class Job:
    """A process that runs. about: the mutant, or the file of tests."""

    about: Mutant | TimedFile
    task: Task
    process: Any
    connection: Connection
    scratch: str
    limit_s: float
    began: float = field(default_factory=time.monotonic)
    last: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    key: str = ""
    """Of a file of tests, as it was when the process started."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def killed(self) -> bool:
        """Whether a test has noticed the mutant."""
        return self.last.get("outcome") in KILLED

    def stop(self) -> None:
        """Ends the process, and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


class Runner:
    """`run` yields words on how far it is, now and then."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU has no part in this
        os.environ["TRITON_INTERPRET"] = "1"
        path = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["property_tests.mutants.preload"])
        self.mutants = results.every_mutant(settings.modules)
        self.done = results.latest(results.read(settings.results), self.mutants)
        self.queue = self._queue()
        self.planned = len(self.queue)
        self.files: dict[str, TimedFile] = {}
        self.jobs: list[Job] = []
        self.tried: Counter[str] = Counter()
        self.began = time.monotonic()

    @property
    def time_left(self) -> float:
        return 60 * self.settings.minutes - (time.monotonic() - self.began)

    def run(self) -> Iterator[str]:
        waiting = self._known_baselines()
        results.append(self.settings.results, {"run": self._facts()})
        try:
            while self.jobs or (self.time_left > 0 and (waiting or self.queue)):
                while self.time_left > 0 and len(self.jobs) < self.settings.jobs:
                    if waiting:
                        self._start_baseline(waiting.pop(0))
                    elif not self._start_mutant():
                        break
                if self.time_left < -GRACE_S:
                    break
                self._listen()
                yield self._word(len(waiting))
        finally:
            for job in self.jobs:
                job.stop()
        left_out = {n: why for file in self.files.values() for n, why in file.left_out.items()}
        left_out = {n: why for n, why in left_out.items() if not why.startswith("skipped")}
        if left_out:
            results.append(self.settings.results, {"left_out": left_out})

    # -- the order -----------------------------------------------------------------------------

    def _queue(self) -> list[Mutant]:
        rng = random.Random(self.settings.seed)
        rooms: list[list[Mutant]] = []
        for room in ROOMS:
            own = [m for m in self.mutants.values() if m.module in room.modules]
            rng.shuffle(own)
            rooms.append(own)
        in_turn = [m for row in zip_longest(*rooms) for m in row if m is not None]
        if self.settings.again:
            chosen = [m for m in in_turn if self._outcome(m) in SURVIVED]
        else:
            known = (*KILLED, *SURVIVED)
            first = in_turn[: self.settings.count]
            chosen = [m for m in first if self._outcome(m) not in known]
        return chosen

    def _outcome(self, mutant: Mutant) -> str:
        return str(self.done[mutant.name]["outcome"]) if mutant.name in self.done else ""

    # -- processes -----------------------------------------------------------------------------

    def _known_baselines(self) -> list[str]:
        """Reads those that are known; returns the files whose tests have to run first."""
        known = {
            line["key"]: line
            for line in results.read(results.BASELINE)
            if all(results.digest_of(module) == was for module, was in line["modules"].items())
        }
        needed = {file for m in self.queue for file in self.settings.tests_of(room_of(m.module))}
        waiting = []
        for file in files_of_tests():
            if file not in needed or not (ROOT / file).exists():
                continue
            if (key := results.baseline_key(file)) in known:
                self.files[file] = TimedFile.of(known[key])
            else:
                waiting.append(file)
        return sorted(waiting, key=lambda file: -(ROOT / file).stat().st_size)

    def _start_baseline(self, file: str) -> None:
        task = Task([file], probed=all_modules(), longest_s=LONGEST_TEST_S)
        self._start(TimedFile(file), task, LONGEST_FILE_S)

    def _start_mutant(self) -> bool:
        """Starts the next one whose tests are known; False where there is none."""
        ready = {
            room.name
            for room in ROOMS
            if all(
                file in self.files or not (ROOT / file).exists()
                for file in self.settings.tests_of(room)
            )
        }
        for at, mutant in enumerate(self.queue):
            room = room_of(mutant.module)
            if room.name not in ready:
                continue
            del self.queue[at]
            tests = chosen_tests(mutant, room, self.files, self.settings.budget_s)
            if not tests:
                if any(self.files[file].tests for file in room.tests if file in self.files):
                    self._note(mutant, "unreached", 0.0)
                else:  # no test of this part runs here, which says nothing about the mutant
                    self.tried["not tried"] += 1
                return True
            files = list(dict.fromkeys(name.split("::")[0] for name in tests))
            allowed = {name: 5 + 6 * seconds for name, seconds in tests.items()}
            limit_s = 60 + 3 * sum(tests.values()) + max(allowed.values())
            self._start(mutant, Task(files, (mutant.module, mutant.index), allowed), limit_s)
            return True
        return False

    def _start(self, about: Mutant | TimedFile, task: Task, limit_s: float) -> None:
        scratch = tempfile.mkdtemp(prefix="mut-")
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=work, args=(task, theirs, scratch))
        process.start()
        theirs.close()
        key = results.baseline_key(about.file) if isinstance(about, TimedFile) else ""
        self.jobs.append(Job(about, task, process, ours, scratch, limit_s, key=key))

    def _listen(self) -> None:
        ready = wait([job.connection for job in self.jobs], timeout=1.0) if self.jobs else []
        for job in list(self.jobs):
            ended = False
            try:
                while job.connection in ready and not ended and job.connection.poll():
                    ended = self._hear(job, job.connection.recv())
            except (EOFError, OSError):
                ended = True
            if ended or job.seconds > job.limit_s:
                if ended and job.end is None and not job.killed:
                    job.process.join(5)  # for its exit code
                job.stop()
                self.jobs.remove(job)
                self._finish(job)

    def _hear(self, job: Job, message: dict[str, Any]) -> bool:
        """Whether it was the last one."""
        if "end" in message:
            job.end = message
            return True
        if "error" in message:
            job.last = message
            return False
        if isinstance(job.about, TimedFile):
            job.about.tell(message)
            return False
        if "not_collected" in message:
            job.last = {"outcome": "broken", "killer": message["not_collected"], **message}
        else:
            job.last = {**message, "killer": message["test"]}
        return job.killed

    def _finish(self, job: Job) -> None:
        if isinstance(job.about, TimedFile):
            tests = job.about
            self.files[tests.file] = tests
            if job.end is None:
                late = job.seconds > job.limit_s
                why = job.last.get("error", "took too long" if late else "its process died")
                tests.left_out[tests.file] = f"{why}, after {len(tests.tests)} tests"
            else:
                results.append(results.BASELINE, tests.line(job.key))
            return
        mutant, late = job.about, job.seconds > job.limit_s
        if job.killed:
            last = job.last
            self._note(mutant, last["outcome"], job.seconds, last["killer"], last["message"])
        elif job.end is None:
            # an exit code of 1: worker.py itself failed, which says nothing about the mutant
            died = "crash" if (job.process.exitcode or 0) < 0 else "error"
            message = job.last.get("error", "")
            self._note(mutant, "timeout" if late else died, job.seconds, message=message)
        elif job.end["end"] == 0 and job.end["ran"]:
            self._note(mutant, "survived", job.seconds)
        else:
            # 2 and 4: it stopped before any test, as where a conftest cannot be imported
            outcome = "broken" if job.end["end"] in (2, 4) else "error"
            self._note(mutant, outcome, job.seconds, message=f"pytest ended with {job.end}")

    def _note(
        self, mutant: Mutant, outcome: str, seconds: float, killer: str = "", message: str = ""
    ) -> None:
        self.tried[outcome] += 1
        if self.settings.tests and outcome not in KILLED:
            return
        line: Line = {
            "mutant": mutant.name,
            "digest": mutant.function_digest,
            "line": mutant.line,
            "before": mutant.before,
            "after": mutant.after,
            "outcome": outcome,
            "seconds": round(seconds, 1),
        }
        line |= {"killer": killer} if killer else {}
        line |= {"message": message} if message and outcome != "failed" else {}
        results.append(self.settings.results, line)

    # -- words ---------------------------------------------------------------------------------

    def _word(self, waiting: int) -> str:
        killed = sum(self.tried[outcome] for outcome in KILLED)
        survived = sum(self.tried[outcome] for outcome in SURVIVED)
        running = sum(isinstance(job.about, TimedFile) for job in self.jobs)
        tests = f"{waiting + running} files of tests to be timed; " if waiting + running else ""
        return (
            f"{tests}{killed + survived} of {self.planned} mutants: {killed} killed, {survived} "
            f"survived; {max(0, self.time_left) / 60:.0f} min left"
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "python": platform.python_version(),
            "torch": _version("torch"),
            "cores": os.cpu_count(),
            "jobs": self.settings.jobs,
            "minutes": self.settings.minutes,
            "seed": self.settings.seed,
            "budget_s": self.settings.budget_s,
            "mutants": len(self.mutants),
        }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown"
    return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def shown(runner: Runner, every_s: float = 15.0) -> None:
    """Runs it. On a terminal with a bar, else with a line now and then."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns) as bar:
            task = bar.add_task("", total=runner.planned)
            for word in runner.run():
                bar.update(task, description=word, completed=runner.tried.total())
        return
    last = -every_s
    for word in runner.run():
        if time.monotonic() - last > every_s:
            last = time.monotonic()
            print(word, flush=True)


def shown_alone(mutant: Mutant, room: Room) -> int:
    """Runs pytest in the foreground with the mutant planted and every test of its room's files."""
    files = [file for file in room.tests if (ROOT / file).exists()]
    code = (
        "import sys; from property_tests.mutants import worker; "
        f"sys.exit(worker.in_front({mutant.module!r}, {mutant.index}, {files!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode
