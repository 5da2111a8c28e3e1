"""The dispatcher against workers made of a script: no Ray needed, every way of losing a worker, in
an order that is known.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import experiments.__main__ as cli
from experiments.cluster.dispatch import Dispatcher, Job, WorkerError, WorkerEvent
from experiments.cluster.executor import EXECUTORS, Options
from experiments.cluster.ray_workers import run_block
from experiments.host import provenance
from experiments.launch import runner
from experiments.launch.runner import Runner
from experiments.records import store
from experiments.records.ledger import Ledger
from tests.support.fake_engine import make_plan, without

Script = Callable[[str, int], list[str] | None]
"""(slot, block) -> the events in place of a whole block ("end" is the next launch); None for a whole block."""


class ScriptedWorkers:
    """Slots that hand over ready-made records at once, and die where the script says so."""

    def __init__(self, plan: dict[str, Any], slots: list[str], script: Script) -> None:
        self.plan, self.names, self.script = plan, slots, script
        self.events: list[tuple[str, WorkerEvent]] = []
        self.given: list[tuple[str, int]] = []

    def slots(self) -> dict[str, str]:
        return {slot: f"machine {slot}" for slot in self.names}

    def start(self, slot: str, job: Job) -> None:
        assert slot not in [s for s, _ in self.events], "one block at a time"
        self.given.append((slot, job["block"]))
        launches = [entry for entry in self.plan["launches"] if entry["block"] == job["block"]]
        for kind in self.script(slot, job["block"]) or ["end"] * len(launches) + ["done"]:
            event: WorkerEvent = {"event": kind, "reason": "as told"}
            if kind == "end":
                entry = launches.pop(0)
                written = {
                    "tokens": {slot: "x"},
                    "logs": {f"{entry['launch']}.log": "why"},
                    "environments": {},
                }
                event |= {"launch": entry, "record": self.record(entry, job, slot), **written}
            self.events.append((slot, event))

    def record(self, entry: dict[str, Any], job: Job, slot: str) -> dict[str, Any]:
        return {
            "kind": "launch",
            "schema": 1,
            "plan_hash": self.plan["plan_hash"],
            "launch": entry["launch"],
            "block": entry["block"],
            "cell": entry["cell"],
            "attempt": 1 + job["earlier"][entry["launch"]],
            "boot_id": slot,
            "status": "ok",
            "total_s": 1.0,
            "provenance": {"git": None, "code_digest": job["code_digest"]},
        }

    def poll(self, timeout_s: float) -> list[tuple[str, WorkerEvent]]:
        return [self.events.pop(0)] if self.events else []


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    return make_plan(tmp_path / "model", blocks=3)


def dispatch(
    plan: dict[str, Any], out: Path, workers: ScriptedWorkers, **options: Any
) -> tuple[bool, list[str]]:
    told: list[str] = []
    listener = lambda event, details: told.append(details["text"]) if event == "message" else None  # noqa: E731
    with Ledger(plan, out, provenance.code_digest(), resume=True, listener=listener) as ledger:
        return Dispatcher(ledger, workers, patience_s=0.2).run(**options), told


def places(out: Path) -> dict[int, set[str]]:
    """Where the counted launches of each block ran."""
    found: dict[int, set[str]] = {}
    for record in store.counted(store.read(out)):
        found.setdefault(record["block"], set()).add(record["boot_id"])
    return found


def test_a_block_runs_in_one_place_and_again_elsewhere_when_it_is_lost(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the tests also run where there is no repository: from a release's archive, in a container
    here = {"commit": "c0ffee", "branch": "main", "dirty": False, "dirty_digest": None}
    monkeypatch.setattr(provenance, "git_state", lambda: here)

    def script(slot: str, block: int) -> list[str] | None:
        return ["end", "end", "lost"] if (slot, block) == ("a", 0) else None

    workers = ScriptedWorkers(plan, ["a", "b"], script)
    done, told = dispatch(plan, tmp_path / "out", workers)
    assert done
    assert ("b", 0) in workers.given, "elsewhere"
    assert len(store.counted(store.read(tmp_path / "out"))) == 9
    assert all(len(slots) == 1 for slots in places(tmp_path / "out").values()), (
        "a pair never straddles machines"
    )
    superseded = [
        (r["launch"], r["attempt"])
        for r in store.read(tmp_path / "out")
        if r["kind"] == "superseded"
    ]
    assert superseded == [("b00-o00-baseline", 1), ("b00-o01-aa", 1)]
    assert "the worker on machine a was lost in block 0 (as told); the block is restarted" in told
    recorded = store.counted(store.read(tmp_path / "out"))[0]["provenance"]
    assert recorded["git"] == here, "a worker's copy has no repository; the dispatcher's has"


def test_with_one_machine_a_lost_block_begins_again_there_and_not_for_ever(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    lives = iter([["end", "lost"], ["lost"], None, None, None])
    assert dispatch(
        plan, tmp_path / "out", ScriptedWorkers(plan, ["a"], lambda slot, block: next(lives))
    )[0]
    assert len(store.counted(store.read(tmp_path / "out"))) == 9
    workers = ScriptedWorkers(plan, ["a"], lambda slot, block: ["end", "lost"])
    with pytest.raises(
        WorkerError, match=r"block . lost its worker 3 times.*run the same command to resume"
    ):
        dispatch(plan, tmp_path / "other", workers)
    assert store.counted(store.read(tmp_path / "other")) == []
    assert dispatch(
        plan, tmp_path / "other", ScriptedWorkers(plan, ["a"], lambda slot, block: None)
    )[0]
    again = store.counted(store.read(tmp_path / "other"))
    assert len(again) == 9
    assert all(r["attempt"] > 1 for r in again if r["launch"] == "b00-o00-baseline"), (
        "attempts go on where they were"
    )


def test_a_machine_that_cannot_run_the_plan_is_left_aside(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    workers = ScriptedWorkers(
        plan, ["a", "b"], lambda slot, block: ["refused"] if slot == "a" else None
    )
    done, told = dispatch(plan, tmp_path / "out", workers)
    assert done
    assert [slot for slot, _ in workers.given].count("a") == 1
    assert any("machine a cannot run block 0: as told" in text for text in told)
    with pytest.raises(WorkerError, match="no worker can run block 0: machine a: as told"):
        dispatch(
            plan, tmp_path / "other", ScriptedWorkers(plan, ["a"], lambda slot, block: ["refused"])
        )
    with pytest.raises(WorkerError, match=r"no machine with a CPU was available"):
        dispatch(plan, tmp_path / "nobody", ScriptedWorkers(plan, [], lambda slot, block: None))


def test_no_block_begins_that_would_not_end_before_the_deadline(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    workers = ScriptedWorkers(plan, ["a"], lambda slot, block: None)
    # 0.9 s planned, 3 s once one has run
    done, told = dispatch(plan, tmp_path / "out", workers, deadline=time.monotonic() + 2)
    assert not done
    assert workers.given == [("a", 0)]
    assert "stopped: no further block would finish before the deadline" in told
    assert dispatch(plan, tmp_path / "out", workers)[0]
    assert len(store.counted(store.read(tmp_path / "out"))) == 9


def test_what_another_executor_left_half_done_begins_again(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        for entry in runner.pending()[:4]:
            runner.run_launch(entry)
    assert dispatch(plan, tmp_path / "out", ScriptedWorkers(plan, ["a"], lambda slot, block: None))[
        0
    ]
    assert places(tmp_path / "out") == {0: {provenance.boot_id()}, 1: {"a"}, 2: {"a"}}


def test_the_environment_report_comes_home_with_the_records(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block through the code of a Ray worker, without Ray."""

    def report(python: str, folder: Path) -> str:
        (folder / "environment-0123.txt").write_text("PyTorch version: as told\n")
        return "environment-0123.txt"

    monkeypatch.setattr(runner, "ENGINES", {"tests.support.fake_engine"})
    monkeypatch.setattr(provenance, "collect_env", report)
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    workers = ScriptedWorkers(plan, ["a"], lambda slot, block: None)
    context = {
        "pythons": {},
        "boot_id": "a",
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cache": str(tmp_path),
    }
    workers.start = lambda slot, job: workers.events.extend(
        (slot, event) for event in run_block(job, context)
    )  # type: ignore[method-assign]
    assert dispatch(plan, tmp_path / "out", workers, blocks=[0])[0]
    assert {
        r["provenance"]["collect_env"] for r in store.counted(store.read(tmp_path / "out"))
    } == {"environment-0123.txt"}
    assert (tmp_path / "out" / "environment-0123.txt").read_text() == "PyTorch version: as told\n"


def test_a_log_that_cannot_be_written_is_said(plan: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out" / store.LOGS / "b00-o00-baseline.log").mkdir(parents=True)
    with pytest.raises(
        store.RecordError, match=r"b00-o00-baseline.log: cannot be written .*same command again"
    ):
        dispatch(plan, tmp_path / "out", ScriptedWorkers(plan, ["a"], lambda slot, block: None))


def test_without_ray_everything_else_works_and_the_error_says_what_to_install(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = "import sys, experiments.__main__; sys.exit('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", load],
        env=without(tmp_path / "hook", "ray"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        WorkerError,
        match=r"needs Ray; install it with: pip install -c constraints.txt -e '.\[ray\]'",
    ):
        EXECUTORS["ray"](
            plan, tmp_path / "out", Options(executor="ray"), lambda event, details: None
        )


@pytest.mark.parametrize(
    ("executor", "address", "message"),
    [
        ("slurm", None, "--executor slurm: unknown; allowed: local, ray"),
        ("local", "auto", "--ray-address auto: add --executor ray"),
    ],
)
def test_wrong_options_are_said(
    executor: str, address: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit):
        cli.make_options(None, None, executor, address, verbose=False)
    assert message in capsys.readouterr().err
