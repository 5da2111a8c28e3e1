"""A study that has measured ends with its report and a sentence; what can refuse is asked before
the first launch.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.cluster.executor import Options
from experiments.host import provenance
from experiments.records import store
from experiments.run import execution, preflight, tracking
from nanovllm.models.checkpoint import ensure_checkpoint
from tests.run.test_tracking import empty_store, root  # noqa: F401  fixtures

# MLflow and alembic deprecate things of their own
pytestmark = pytest.mark.filterwarnings("ignore")
PUBLISHED = provenance.ROOT / "reports" / "published" / "cpu-two-cores" / "embedded"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(PUBLISHED, tmp_path_factory.mktemp("runs") / "finished"))
    execution.render(folder)
    return folder


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=500)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def begun(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three records: MLflow takes its time for each."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "begun"))
    lines = (folder / store.RECORDS).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / store.RECORDS).write_text("".join(lines[:3]), encoding="utf-8")
    return folder


def test_a_database_of_another_mlflow_is_a_message(begun: Path, root: Path) -> None:  # noqa: F811
    """MLflow keeps stores that it has once opened; it has not opened this one."""
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(tracking.TrackingError, match="another version of MLflow"):
        tracking.import_folder(begun, begun / "report", root)


def test_a_damaged_database_is_a_message(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    assert "DatabaseError" in (tracking.objection(tmp_path) or "")
    with pytest.raises(tracking.TrackingError, match=r"mlflow\.db.*DatabaseError"):
        tracking.import_folder(finished, finished / "report", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "feature%2Fx",
        "what?x=1",
        "a b#c",
    ],
)
def test_a_repository_of_any_name_has_its_runs(begun: Path, root: Path, name: str) -> None:  # noqa: F811
    """Jenkins' workspaces hold a percent escape for each slash in a branch's name."""
    moved = root.rename(root.with_name(name))
    assert tracking.objection(moved) is None
    run_id, fresh = tracking.import_folder(begun, begun / "report", moved)
    assert fresh
    assert tracking.import_folder(begun, begun / "report", moved) == (run_id, False)
    assert not [
        path
        for path in moved.parent.iterdir()
        if path != moved and path.name.startswith(("feature", "what", "a"))
    ]


def cannot_write(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A read-only file system, as far as a test can have one: root may write to what chmod forbids."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(str(folder)) and real(path, mode)
    )


def test_mlflow_that_cannot_be_written_leaves_the_report(
    finished: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot_write(monkeypatch, tmp_path)
    assert "not writable" in (tracking.objection(tmp_path) or "")
    monkeypatch.setattr(execution, "render", lambda folder, verbose: None)
    real = tracking.import_folder
    monkeypatch.setattr(
        tracking, "import_folder", lambda folder, report: real(folder, report, tmp_path)
    )
    execution.publish(finished, console)
    assert "report.html" in said(console)
    assert "MLflow   not written" in said(console)
    assert f"experiments import {execution.shown(finished)}" in said(console)


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), ValueError("odd"), OSError(28, "No space left on device")]
)
def test_whatever_mlflow_raises_is_a_tracking_error(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(tracking, "_client", fails)
    with pytest.raises(tracking.TrackingError, match=type(error).__name__):
        tracking.import_folder(finished, finished / "report", tmp_path)
    assert type(error).__name__ in (tracking.objection(tmp_path) or "")


def test_a_gate_that_cannot_run_leaves_the_report(
    finished: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bool:
        raise execution.ExecutionError("the gate broke")

    monkeypatch.setattr(execution.preflight, "check_end", lambda: None)
    monkeypatch.setattr(execution, "run_launches", lambda *_: True)
    monkeypatch.setattr(execution, "run_gate", fails)
    monkeypatch.setattr(tracking, "import_folder", lambda *_: ("id", True))
    monkeypatch.setattr(tracking, "link", lambda run_id: f"http://the/table/of/{run_id}")
    plan = store.read_plan(finished / store.PLAN)
    with pytest.raises(execution.ExecutionError, match="the gate broke"):
        execution.execute(plan, finished, Options(), console)
    assert "report.html" in said(console)
    assert "http://the/table/of/id" in said(console)
    power = next(line for line in said(console).splitlines() if line.startswith("power"))
    achieved = json.loads((finished / "report" / "analysis.json").read_text())["precision"]
    assert f"intervals of ± {achieved['half_width']:.1%}, changes of" in power
    assert re.search(r"detectable \(planned: ± [\d.]+%, [\d.]+%\)$", power), "as published before"
    assert not (finished / execution.FINISHED).exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    plan = store.read_plan(PUBLISHED / store.PLAN)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nanovllm")):
        with pytest.raises(
            store.RecordError, match=r"cannot write records there .*give another --out"
        ):
            preflight.check_folder(plan, folder)
    preflight.check_folder(plan, tmp_path / "new" / "folder")


def test_a_full_disk_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = store.read_plan(PUBLISHED / store.PLAN)
    used = sum(file.stat().st_size for file in PUBLISHED.rglob("*") if file.is_file())
    assert preflight.bytes_needed(plan) > used
    free = type("Usage", (), {"free": preflight.bytes_needed(plan) - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(
        store.RecordError, match=r"MB free, but records and report may take .* MB: free some space"
    ):
        preflight.check_folder(plan, tmp_path)


def test_a_report_that_could_not_be_drawn_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('half installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        store.RecordError,
        match=r"nothing was measured, because the report could not be rendered.*half installed",
    ):
        preflight.check_end(tmp_path)


def test_a_notebooks_backend_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter and Colab export it to every !command; the virtual environment has no such module."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline_that_is_not_here")
    assert preflight.check_end(tmp_path) is None
    command = [
        sys.executable,
        "-c",
        "import reports.figures.pictures, matplotlib; print(matplotlib.get_backend())",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": "src:."},
    )
    assert done.stdout.strip().lower() == "agg"


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError,
        match=r"tiny cannot be built in .*: set NANOVLLM_CACHE to a folder that can be written",
    ):
        ensure_checkpoint("tiny", cache_dir=tmp_path / "file" / "cache", seed=77)
