"""A pytest plugin (conftest.py loads it): the CPU seconds that tests take, user and system, with
those of the processes that they started and waited for.

Unlike durations they do not grow with what else runs on the machine. The end of a run that took more than
LEAST_REPORTED_S of them names the tests and files that took most, marks tests above BUDGET_S, and says how
long test processes were idle because another one was not done. Each test's are in JUnit's XML as well, as
the property `cpu_s`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

BUDGET_S = 20.0
"""For one test. Above it: smaller shapes, a shared engine, fewer processes, or the marker `slow`."""
LEAST_REPORTED_S = 60.0
LONGEST = 10

_began = pytest.StashKey[float]()


def cpu_s() -> float:
    """Of this process so far, and of its children as far as it has waited for them."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Spent:
    """What each test took. Under pytest-xdist, tests run in workers, and this process adds up."""

    def __init__(self) -> None:
        self.by_test: Counter[str] = Counter()
        self.workers_s = 0.0
        self.last_test_ended: dict[str, float] = {}  # by worker

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        item.stash[_began] = cpu_s()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "teardown" and _began in item.stash:
            report.user_properties.append(("cpu_s", round(cpu_s() - item.stash[_began], 2)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.by_test[report.nodeid] += dict(report.user_properties).get("cpu_s", 0.0)  # type: ignore[assignment]
            if (node := getattr(report, "node", None)) is not None:
                self.last_test_ended[node.gateway.id] = report.stop

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu_s"] = cpu_s()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.workers_s += getattr(node, "workeroutput", {}).get("cpu_s", 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        in_tests_s = sum(self.by_test.values())
        if in_tests_s < LEAST_REPORTED_S:
            return
        # waiting for a worker adds what that worker took to this process's children
        all_s = max(self.workers_s, cpu_s())
        by_file: Counter[str] = Counter()
        for test, spent_s in self.by_test.items():
            by_file[test.partition("::")[0]] += spent_s  # type: ignore[assignment]
        write = terminalreporter.write_line
        terminalreporter.write_sep(
            "=", f"CPU time: {all_s:.0f} s, {in_tests_s:.0f} s of it in tests"
        )
        if self.last_test_ended:
            last = max(self.last_test_ended.values())
            idle = [f"{last - ended:.0f} s" for ended in self.last_test_ended.values()]
            write(f"processes idle at the end: {', '.join(idle)}")
        for title, found in (("files", by_file), ("tests", self.by_test)):
            write(f"the {title} that took most:")
            for name, spent_s in found.most_common(LONGEST):
                over = title == "tests" and spent_s > BUDGET_S
                write(
                    f"{spent_s:8.1f} s  {name}{f'  (over the {BUDGET_S:.0f} s of a test)' if over else ''}"
                )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Spent(), "nanovllm-spent")
