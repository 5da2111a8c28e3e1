"""Launches forked from a process that has its libraries imported: they end, fail and are killed
like any other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.host import environment
from experiments.launch import engine_process, runner
from experiments.launch.fork_server import ForkServer, ForkServerError
from experiments.records import store
from tests.support.fake_engine import make_plan


@pytest.fixture
def fork_server(tmp_path: Path) -> Iterator[ForkServer]:
    made = ForkServer(
        sys.executable, environment.for_subprocess(), ("json",), tmp_path / "fork-server.log"
    )
    yield made
    made.close()


def a_launch_that_hangs(tmp_path: Path) -> list[str]:
    """The arguments of one, its plan written."""
    plan = make_plan(tmp_path / "model", blocks=1, hangs="hang")
    store.write_plan(plan, tmp_path / store.PLAN)
    (launched,) = (entry["launch"] for entry in plan["launches"] if entry["cell"] == "hangs")
    return [
        "--plan",
        str(tmp_path / store.PLAN),
        "--launch",
        launched,
        "--attempt",
        "1",
        "--model",
        str(tmp_path / "model"),
        "--result",
        str(tmp_path / "result"),
        "--spawned-at",
        repr(time.time()),
    ]


def test_a_launch_is_forked_and_its_status_and_output_are_its_own(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    log = tmp_path / "launch.log"
    log.write_bytes(b"")
    started = fork_server.start(["--plan", str(tmp_path / "none.json"), "--launch", "b00"], log)
    assert started.wait(30) == 1
    assert "none.json" in log.read_text()
    again = fork_server.start(["--help"], log)
    assert (again.wait(30), again.pid != started.pid) == (0, True)


def test_a_killed_launch_says_by_which_signal_and_the_fork_server_goes_on(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    log = tmp_path / "launch.log"
    hanging = fork_server.start(a_launch_that_hangs(tmp_path), log)
    with pytest.raises(subprocess.TimeoutExpired):
        hanging.wait(1.0)
    runner.kill_group(hanging)
    assert hanging.returncode == -signal.SIGKILL
    assert fork_server.start(["--help"], log).wait(30) == 0


def test_a_module_that_cannot_be_imported_is_said(tmp_path: Path) -> None:
    broken = ForkServer(
        sys.executable,
        environment.for_subprocess(),
        ("no_such_module",),
        tmp_path / "fork-server.log",
    )
    with pytest.raises(ForkServerError, match="no_such_module"):
        broken.start(["--help"], tmp_path / "log")
    broken.close()


def test_a_launch_ends_with_its_fork_server(tmp_path: Path, fork_server: ForkServer) -> None:
    log = tmp_path / "launch.log"
    log.write_bytes(b"")
    hanging = fork_server.start(a_launch_that_hangs(tmp_path), log)
    deadline = time.monotonic() + 30
    while "hangs as told" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    fork_server.close()
    while time.monotonic() < deadline:
        try:
            os.kill(hanging.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the launch outlived the process that it was forked from")


class Engine:
    """An adapter whose servings take these seconds; kernels: how many it has loaded after each."""

    def __init__(self, seconds: list[float], kernels: list[int | None] | None = None) -> None:
        self.seconds, self.kernels, self.served = seconds, kernels or [0] * len(seconds), 0

    def serve(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        duration_s = self.seconds[min(self.served, len(self.seconds) - 1)]
        self.served += 1
        return {
            "duration_s": duration_s,
            "outputs": [[self.served]],
            "finish_reasons": ["length"],
            "step_times_s": [],
            "request_times_s": [[0.0, duration_s, duration_s]],
        }

    def kernels_loaded(self) -> int | None:
        return (
            self.kernels[min(self.served, len(self.kernels)) - 1]
            if self.served
            else self.kernels[0] and 0
        )

    def reset(self) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {}

    def toggles(self) -> dict[str, Any]:
        return {}


def serve(engine: Engine, least_timed_s: float) -> tuple[dict[str, Any], list[list[int]]]:
    workload = {"fingerprint": "f", "waves": [[{"prompt_token_ids": [1], "max_tokens": 1}]]}
    return engine_process.serve_steadily(engine, workload, least_timed_s)  # type: ignore[arg-type]


def test_without_a_least_time_work_is_served_once() -> None:
    record, outputs = serve(Engine([0.1]), 0.0)
    assert (record["duration_s"], outputs, "servings_s" in record) == (0.1, [[1]], False)


def test_long_work_is_served_once() -> None:
    record, _ = serve(Engine([3.0, 9.0]), 0.5)
    assert (record["servings_s"], record["rehearsals_s"]) == ([3.0], [])


def test_short_work_is_rehearsed_and_the_median_serving_counts_with_its_tokens() -> None:
    record, outputs = serve(Engine([0.9 / 4, 0.30, 0.10, 0.20, 0.9]), 0.5)
    assert (record["rehearsals_s"], record["servings_s"]) == ([0.225], [0.3, 0.1, 0.2])
    assert (record["duration_s"], outputs) == (0.2, [[4]])


def test_a_serving_in_which_a_kernel_was_loaded_does_not_count() -> None:
    record, outputs = serve(Engine([9.0, 2.0, 1.0], kernels=[3, 4, 4]), 0.5)
    assert (record["rehearsals_s"], record["servings_s"], outputs) == ([9.0, 2.0], [1.0], [[3]])


def test_an_engine_that_cannot_tell_is_rehearsed_once() -> None:
    record, _ = serve(Engine([9.0, 2.0], kernels=[None]), 0.5)
    assert (record["rehearsals_s"], record["servings_s"]) == ([9.0], [2.0])


def test_very_short_work_is_served_a_bounded_number_of_times() -> None:
    record, _ = serve(Engine([1e-6]), 60)
    assert len(record["servings_s"]) == engine_process.MOST_SERVINGS
