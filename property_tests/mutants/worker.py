"""One run of pytest in a process of its own, forked from one that has the libraries loaded.

It imports one module with a mutant in it, or some with probes, by a finder that stands before all
others: no file is changed, so any number of them run side by side, and an interrupted one leaves
nothing behind. What tests start as further processes runs the unchanged files.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from property_tests.mutants.operators import mutated, with_probes
from property_tests.mutants.rooms import ROOT

OPTIONS = (
    "-q",
    "--import-mode=importlib",
    "--hypothesis-profile=mutants",
    "--hypothesis-seed=0",  # the same examples for every mutant, and without one
    "-m",
    "not slow and not bench",
    "-o",
    "addopts=",  # strict configuration would ask for plugins that are not needed here
    "-p",
    "no:cacheprovider",
    "-p",
    "no:timeout",  # it would take the alarm that is used below
    "-p",
    "no:xdist",
    "-W",
    "ignore::pytest.PytestConfigWarning",
    "-W",
    "ignore::pytest.PytestUnknownMarkWarning",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",  # of plugins among the libraries that are loaded
)


@dataclass(frozen=True)
class Task:
    """mutant: (module, index). tests: names and seconds allowed, in the order in which they run, or
    None for all tests of the files, which then run to the end, with probes in `probed` modules.
    """

    files: Sequence[str]
    mutant: tuple[str, int] | None = None
    tests: dict[str, float] | None = None
    probed: Sequence[str] = ()
    longest_s: float = 60.0
    log: str | None = None


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are changed; `change` makes a syntax tree of a source text."""

    def __init__(self, modules: dict[str, Callable[[str], Any]]) -> None:
        self.modules = modules

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin, self.modules[name])
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, change: Callable[[str], Any]) -> None:
        super().__init__(name, path)
        self.change = change

    def get_code(self, fullname: str) -> CodeType:
        return compile(
            self.change(Path(self.path).read_text()), self.path, "exec", dont_inherit=True
        )


class Plugin:
    """What a run of pytest is told, and what it tells: one message for each test."""

    def __init__(self, task: Task, send: Callable[[dict[str, Any]], None]) -> None:
        self.task, self.send = task, send
        self.now: set[tuple[str, int]] = set()
        self.shared: set[tuple[str, int]] = set()
        self.outcome, self.message, self.current = "passed", "", ""
        self.ran = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        self.shared |= self.now
        tests = self.task.tests
        if tests is not None:
            by_name = {item.nodeid: item for item in items}
            config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in tests])
            items[:] = [by_name[name] for name in tests if name in by_name]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.send({"not_collected": report.nodeid, "message": _last_line(report.longrepr)})

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        before, self.now = self.now, set()
        builtins.__dict__["__reached__"] = self.now.add
        try:
            return (yield)
        finally:
            self.shared |= self.now
            self.now |= before
            builtins.__dict__["__reached__"] = self.now.add

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.outcome, self.message, self.current = "passed", "", item.nodeid
        self.now = set()
        builtins.__dict__["__reached__"] = self.now.add
        allowed = self.task.longest_s if self.task.tests is None else self.task.tests[item.nodeid]
        signal.signal(signal.SIGALRM, self._time_is_up)
        signal.setitimer(signal.ITIMER_REAL, allowed)
        begin = time.monotonic()
        result = yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.ran += 1
        self._tell(time.monotonic() - begin)
        return result

    def _time_is_up(self, *_: Any) -> None:
        self.outcome = "timeout"
        if self.task.tests is not None:
            self._tell(0.0)
            os._exit(0)
        raise TimeoutError("longer than a test of mutants may take")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.outcome != "timeout":
            self.outcome, self.message = "failed", _last_line(report.longrepr)
        elif report.skipped and self.outcome == "passed":
            self.outcome, self.message = "skipped", _last_line(report.longrepr)

    def _tell(self, seconds: float) -> None:
        told: dict[str, Any] = {
            "test": self.current,
            "outcome": self.outcome,
            "seconds": round(seconds, 3),
            "message": self.message,
        }
        if self.task.probed:
            told["reached"], told["shared"] = _by_module(self.now), _by_module(self.shared)
            self.shared = set()
        self.send(told)


def _by_module(places: set[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for module, number in sorted(places):
        found.setdefault(module, []).append(number)
    return found


def in_front(module: str, index: int, files: list[str]) -> int:
    """Runs all tests of the files with a mutant planted, in this process."""
    sys.meta_path.insert(0, Finder({module: partial(mutated, index=index)}))
    from property_tests.support import profiles

    profiles.register()
    return int(pytest.main([*files, *OPTIONS, "-x"]))


def _last_line(report: Any) -> str:
    crash = getattr(report, "reprcrash", None)
    if crash is not None:
        return str(crash.message).strip().split("\n")[0][:200]
    if isinstance(report, tuple):  # a skip: file, line, reason
        return str(report[-1])[:200]
    lines = str(report).strip().split("\n")
    return lines[-1][:200]


def work(task: Task, connection: Connection, scratch: str) -> None:
    """The process: runs the task, tells about each test, and ends with {"end": pytest's exit code}.
    It leads a group of processes of its own, so that the one who started it can end all that tests
    leave behind.
    """
    try:
        _work(task, connection, scratch)
    except Exception as error:  # noqa: BLE001  # told, and judged there
        connection.send({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)


def _work(task: Task, connection: Connection, scratch: str) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ["TMPDIR"] = scratch
    tempfile.tempdir = None
    output = os.open(task.log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    for path in (str(ROOT), str(ROOT / "src")):
        if path not in sys.path:
            sys.path.insert(0, path)
    plugin = Plugin(task, connection.send)
    builtins.__dict__["__reached__"] = plugin.now.add
    changes: dict[str, Callable[[str], Any]] = {
        module: partial(with_probes, module=module) for module in task.probed
    }
    if task.mutant is not None:
        module, index = task.mutant
        changes[module] = partial(mutated, index=index)
    sys.meta_path.insert(0, Finder(changes))
    if loaded := [name for name in changes if name in sys.modules]:
        raise RuntimeError(f"loaded before they could be changed: {loaded}")
    from property_tests.support import profiles

    profiles.register()
    arguments = [*task.files, *OPTIONS, f"--basetemp={scratch}/t"]
    if task.tests is not None:
        arguments.append("-x")
    code = pytest.main(arguments, plugins=[plugin])
    connection.send({"end": int(code), "ran": plugin.ran})
    connection.close()
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(0)
