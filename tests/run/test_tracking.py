"""MLflow is a view of the records: rebuilt at any time, the same each time, wherever the repository
lies.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from experiments.host import provenance
from experiments.launch.runner import Runner
from experiments.records import store
from experiments.run import tracking
from experiments.run.mlflow_view import launch_view
from tests.support.fake_engine import make_plan

mlflow = pytest.importorskip("mlflow")
# MLflow and alembic deprecate things of their own
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def execution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with one failing cell, executed once."""
    path = tmp_path_factory.mktemp("execution")
    plan = make_plan(path / "model", crash="crash")
    with Runner(plan, path / "out", resume=False) as runner:
        runner.run()
    report = path / "report"
    (report / "figures").mkdir(parents=True)
    (report / "figures" / "forest.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    effect = {
        "metric": "output_tokens_per_s",
        "workload": "a",
        "cell": "prefix_cache=on",
        "role": "treatment",
        "n": 2,
        "ratio": 1.25,
        "low": 1.1,
        "high": 1.4,
        "verdict": "faster",
    }
    analysis = {
        "metric": {"key": "output_tokens_per_s"},
        "answer": {"sentence": "It is faster."},
        "effects": [effect],
    }
    (report / "analysis.json").write_text(json.dumps(analysis))
    (report / "report.html").write_text("<p>report</p>")
    return path


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tables and nothing in it: MLflow needs seconds to create them."""
    root = tmp_path_factory.mktemp("store")
    client = tracking._client(root)
    client.search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    shutil.copyfile(empty_store, root / "mlflow.db")
    return root


def runs(root: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def test_a_study_is_a_parent_run_and_a_nested_run_each_launch(execution: Path, root: Path) -> None:
    run_id, fresh = tracking.import_folder(execution / "out", execution / "report", root)
    assert fresh
    found = {run.info.run_id: run for run in runs(root)}
    parent = found.pop(run_id)
    assert len(found) == 8
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {run_id}
    assert parent.data.params["factor.prefix_cache"] == "off | on"
    assert parent.data.metrics["effect/a/prefix_cache:on/low"] == 1.1
    assert (
        "| a | prefix_cache=on | 1.250 | 1.100 to 1.400 | 2 | faster |"
        in parent.data.tags["mlflow.note.content"]
    )
    assert {"nanovllm.hardware", "nanovllm.fingerprint.a", "git.dirty"} <= set(parent.data.tags)
    assert {i.dataset.name for i in parent.inputs.dataset_inputs} == {"a", "b"}
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    history = client.get_metric_history(run_id, "a/output_tokens_per_s/baseline")
    assert sorted(point.step for point in history) == [0, 1]
    by_name = {run.info.run_name: run for run in found.values()}
    on = by_name["b00-o02-prefix_cache=on"]
    assert (on.data.params["prefix_cache"], on.data.params["block"], on.info.status) == (
        "on",
        "0",
        "FINISHED",
    )
    assert on.data.metrics["toggle/prefix_cache/engaged"] == 8
    failed = by_name["b00-o03-crash"]
    assert failed.info.status == "FAILED"
    assert "crashes as told" in failed.data.tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("folder", "series"),
    [
        ("cpu-two-cores/embedded", "system/cpu_utilization_percentage"),
        ("h200/gpu-canonical", "system/gpu_0_power_usage_watts"),
    ],
)
def test_a_launch_shows_what_the_machine_did_meanwhile(folder: str, series: str) -> None:
    """Published records of real launches, as the series that MLflow draws under "system metrics"."""
    published = provenance.ROOT / "reports" / "published" / folder
    found = store.read(published)
    record = next(record for record in found if record["kind"] == "launch")
    view = launch_view(store.read_plan(published / store.PLAN), record, found)
    points = [point for point in view.metrics if point.key == series]
    assert len(points) > 3
    assert [point.step for point in points] == list(range(len(points)))
    assert all(0 < earlier.time_s < later.time_s for earlier, later in itertools.pairwise(points))
    assert any(point.value > 0 for point in points)


def test_importing_again_creates_nothing_new(execution: Path, root: Path) -> None:
    first = tracking.import_folder(execution / "out", execution / "report", root)
    before = {run.info.run_id for run in runs(root)}
    assert tracking.import_folder(execution / "out", execution / "report", root) == (
        first[0],
        False,
    )
    copy = root / "carried"  # the same records, copied elsewhere, their lines doubled
    shutil.copytree(execution / "out", copy)
    text = (copy / store.RECORDS).read_text()
    (copy / store.RECORDS).write_text(text + text)
    assert tracking.import_folder(copy, execution / "report", root) == (first[0], False)
    assert {run.info.run_id for run in runs(root)} == before


def test_a_grown_or_interrupted_import_is_replaced(
    execution: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = root / "part"
    shutil.copytree(execution / "out", part)
    lines = (part / store.RECORDS).read_text().splitlines(keepends=True)
    (part / store.RECORDS).write_text("".join(lines[:3]))
    real, calls = tracking._write, []

    def breaks(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(tracking, "_write", breaks)
    with pytest.raises(KeyboardInterrupt):
        tracking.import_folder(part, None, root)
    monkeypatch.setattr(tracking, "_write", real)
    tracking.import_folder(part, None, root)
    assert len(runs(root)) == 1 + 3
    (part / store.RECORDS).write_text("".join(lines))
    tracking.import_folder(part, None, root)
    assert len(runs(root)) == 1 + 8


def test_a_moved_repository_keeps_its_artifacts(
    execution: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, _ = tracking.import_folder(execution / "out", execution / "report", root)
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        ours = "SELECT artifact_location FROM experiments WHERE name = 'fake' UNION SELECT artifact_uri FROM runs"
        stored = database.execute(ours).fetchall()
    assert len(stored) == 1 + 1 + 8
    assert all(path.startswith("mlartifacts/") for (path,) in stored)
    moved = root.with_name("moved")
    root.rename(moved)
    monkeypatch.chdir(moved)
    client = mlflow.MlflowClient(f"sqlite:///{moved / 'mlflow.db'}")
    assert {entry.path for entry in client.list_artifacts(run_id)} == {
        "plan.json",
        "records.jsonl",
        "tokens.jsonl",
        "report",
    }
    report = client.download_artifacts(run_id, "report/report.html", str(moved))
    assert Path(report).read_text() == "<p>report</p>"
    assert tracking.import_folder(execution / "out", execution / "report", moved) == (run_id, False)


def test_a_store_that_mlflow_would_not_look_at_is_an_error(execution: Path, root: Path) -> None:
    trap = root / "mlruns" / "0"
    trap.mkdir(parents=True)
    (trap / "meta.yaml").write_text("")
    with pytest.raises(tracking.TrackingError, match=r"ignores mlflow.db: move .*mlruns away"):
        tracking.import_folder(execution / "out", None, root)


def test_a_folder_without_launches_is_an_error(execution: Path, root: Path) -> None:
    empty = root / "empty"
    empty.mkdir()
    shutil.copyfile(execution / "out" / "plan.json", empty / "plan.json")
    with pytest.raises(tracking.TrackingError, match="no launch is recorded yet"):
        tracking.import_folder(empty, None, root)


def test_what_a_kill_left_is_imported_as_far_as_it_goes(execution: Path, root: Path) -> None:
    """A study killed while it wrote its last record; when it has gone on and ended, the same runs
    as of an undisturbed one.
    """
    killed = root / "killed"
    shutil.copytree(execution / "out", killed)
    whole = (killed / store.RECORDS).read_bytes()
    third = [i for i, byte in enumerate(whole) if byte == ord("\n")][2]
    (killed / store.RECORDS).write_bytes(whole[: third + 400])
    tracking.import_folder(killed, None, root)
    by_status = [run.info.status for run in runs(root) if "mlflow.parentRunId" not in run.data.tags]
    assert by_status == ["FAILED"]  # not everything that was planned counts
    assert len(runs(root)) == 1 + 3
    (killed / store.RECORDS).write_bytes(whole)
    tracking.import_folder(killed, execution / "report", root)
    assert tracking.import_folder(execution / "out", execution / "report", root)[1] is False
    assert len(runs(root)) == 1 + 8


def test_two_studies_share_a_store(execution: Path, root: Path) -> None:
    """Each is an experiment of its own, and neither import touches the other's runs."""
    other = root / "other"
    shutil.copytree(execution / "out", other)
    plan = json.loads((other / store.PLAN).read_text())
    old, plan["study"]["name"] = plan["plan_hash"], "another-study"
    plan["plan_hash"] = store.plan_hash(plan)
    (other / store.PLAN).write_text(json.dumps(plan))
    lines = (other / store.RECORDS).read_text().replace(old, plan["plan_hash"])
    (other / store.RECORDS).write_text(lines)
    first = tracking.import_folder(execution / "out", execution / "report", root)[0]
    second = tracking.import_folder(other, None, root)[0]
    assert len(runs(root)) == 2 * (1 + 8)
    by_id = {run.info.run_id: run for run in runs(root)}
    assert by_id[first].info.experiment_id != by_id[second].info.experiment_id


def test_experiments_of_others_keep_their_artifacts(execution: Path, root: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    other = client.create_experiment("my own", artifact_location="s3://bucket/mine")
    tracking.import_folder(execution / "out", None, root)
    assert client.get_experiment(other).artifact_location == "s3://bucket/mine"


@pytest.mark.slow
def test_the_ui_shows_the_figures_of_a_moved_repository(execution: Path, root: Path) -> None:
    """`mlflow ui` as a user types it, in the repository, which was moved after the import."""
    run_id, _ = tracking.import_folder(execution / "out", execution / "report", root)
    moved = root.rename(root.with_name("moved"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    log = (moved / "ui.log").open("w")
    with (
        log,
        subprocess.Popen(command, cwd=moved, stdout=log, stderr=log, start_new_session=True) as ui,
    ):
        try:
            figure = f"http://127.0.0.1:{port}/get-artifact?path=report/figures/forest.svg&run_uuid={run_id}"
            for _ in range(240):
                with contextlib.suppress(OSError):
                    answer = urllib.request.urlopen(figure, timeout=10)
                    break
                time.sleep(0.5)
            assert answer.status == 200
            assert answer.read() == (execution / "report" / "figures" / "forest.svg").read_bytes()
        finally:
            os.killpg(ui.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_imports_at_once_into_a_fresh_store(execution: Path, tmp_path: Path) -> None:
    """Without the lock one of them dies: table already exists."""
    script = (
        "import sys; from pathlib import Path; from experiments.run import tracking; "
        "tracking.import_folder(*map(Path, sys.argv[1:]))"
    )
    arguments = [
        sys.executable,
        "-c",
        script,
        str(execution / "out"),
        str(execution / "report"),
        str(tmp_path),
    ]
    importers = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for importer in importers:
        _, err = importer.communicate(timeout=120)
        assert importer.returncode == 0, err
    assert len(runs(tmp_path)) == 1 + 8
