"""MLflow is a view of the records: rebuilt at any time, the same each time, wherever the repository
lies.
"""

from __future__ import annotations

import functools
import getpass
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from experiments.host import provenance
from experiments.launch.runner import Runner
from experiments.records import store
from experiments.run import execution as run_of_a_plan
from experiments.run import tracking, ui
from experiments.run.mlflow_view import cell_view, in_a_column, launch_view, study_view
from reports import text
from reports.analysis.analyse import analyse
from reports.page.render import render
from tests.support.fake_engine import make_plan
from tests.support.mlflow_ui import mlflow_ui

mlflow = pytest.importorskip("mlflow")
# MLflow and alembic deprecate things of their own
pytestmark = pytest.mark.filterwarnings("ignore")
RATE = "output_tokens_per_s"


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
    row = {
        "shown": "prefix_cache=on",
        "metrics": {"a/speedup": 1.25, "a/speedup_low": 1.1, "a/output_tokens_per_s": 340.2123},
        "verdicts": {"a": "faster"},
        "intervals": {"a": "1.100–1.400"},
        "verdict": "faster",
        "gate": "pass",
        "evidence": "intervals",
        "says": ["a: ×1.25 (1.1 to 1.4) relative to all off: faster"],
    }
    nothing = {"metrics": {}, "verdicts": {}, "verdict": None, "evidence": "none", "says": []}
    analysis = {
        "metric": {"key": "output_tokens_per_s"},
        "answer": {
            "sentence": "It is faster.",
            "verdict": "faster",
            "output": "Output: identical.",
            "caveats": ["A noisy machine."],
        },
        "effects": [effect],
        "baseline": "baseline",
        "shown": {"baseline": "all off"},
        "by_cell": {
            "baseline": {**nothing, "shown": "all off", "gate": "pass"},
            "aa": {**nothing, "shown": "A/A twin", "gate": "pass"},
            "prefix_cache=on": row,
            "crash": {**nothing, "shown": "crash", "gate": "descriptive"},
        },
    }
    (report / "analysis.json").write_text(json.dumps(analysis))
    (report / "report.html").write_text("<p>report</p>")
    return path


@pytest.fixture(scope="session")
def empty_store(shared_folder: Path) -> Path:
    """A store with tables and nothing in it: MLflow needs ten seconds to create them."""
    whole = shared_folder / "mlflow.db"
    with FileLock(shared_folder / "mlflow.lock"):
        if not whole.is_file():
            aside = shared_folder / "mlflow-is-made"
            aside.mkdir()
            tracking._client(aside).search_experiments()
            shutil.copyfile(aside / "mlflow.db", whole)
    return whole


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    shutil.copyfile(empty_store, root / "mlflow.db")
    return root


def runs(root: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def by_role(root: Path) -> dict[str, dict[str, Any]]:
    """{role: {name of the run: run}}"""
    found: dict[str, dict[str, Any]] = {}
    for run in runs(root):
        found.setdefault(run.data.tags["role"], {})[run.info.run_name] = run
    return found


def test_a_study_has_a_run_for_each_cell_and_below_it_one_for_each_launch(
    execution: Path, root: Path
) -> None:
    run_id, fresh = tracking.import_folder(execution / "out", execution / "report", root)
    assert fresh
    found = by_role(root)
    (study,) = found["study"].values()
    cells, launches = found["cell"], found["launch"]
    assert (study.info.run_id, len(cells), len(launches)) == (run_id, 4, 8)
    assert {run.data.tags["mlflow.parentRunId"] for run in cells.values()} == {run_id}
    assert set(cells) == {"all off", "A/A twin", "prefix_cache=on", "crash"}
    for launch in launches.values():
        above = next(
            cell
            for cell in cells.values()
            if cell.info.run_id == launch.data.tags["mlflow.parentRunId"]
        )
        assert above.data.params["cell"] == launch.data.params["cell"]


def test_a_study_shows_its_answer(execution: Path, root: Path) -> None:
    tracking.import_folder(execution / "out", execution / "report", root)
    (study,) = by_role(root)["study"].values()
    assert study.data.params["factor.prefix_cache"] == "off | on"
    note = study.data.tags["mlflow.note.content"]
    assert "| a | prefix_cache=on | 1.250 | 1.100 to 1.400 | 2 | faster | pass |" in note
    assert "- A noisy machine." in note
    assert note.startswith("**It is faster.**\n\nOutput: identical."), "what a reader came for"
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    of_all = client.get_experiment_by_name("fake").tags["mlflow.note.content"]
    assert of_all.startswith("**It is faster.**\n\nOutput: identical.\n\n")
    assert study.data.metrics == {}  # its numbers are those of its cells
    assert {"nanovllm.plan_hash", "nanovllm.fingerprint.a", "git.dirty"} <= set(study.data.tags)
    assert study.data.tags["all workloads/verdict"] == "faster"
    assert study.data.tags["gate"] == "pass"
    assert "ratio to all off" in note
    assert {i.dataset.name for i in study.inputs.dataset_inputs} == {"a", "b"}


def test_a_cell_shows_the_numbers_of_the_analysis(execution: Path, root: Path) -> None:
    tracking.import_folder(execution / "out", execution / "report", root)
    cells = by_role(root)["cell"]
    on, crash = cells["prefix_cache=on"], cells["crash"]
    assert on.data.metrics == {
        "a/speedup": 1.25,
        "a/speedup_low": 1.1,
        "a/output_tokens_per_s": 340.2,
    }
    told = {
        "gate": "pass",
        "all workloads/verdict": "faster",
        "a/verdict": "faster",
        "a/CI": "1.100–1.400",
        "evidence": "intervals",
        "compared_with": "all off",
        "caveats": "A noisy machine.",
    }
    assert {name: on.data.tags[name] for name in told} == told
    assert "verdict" not in on.data.tags, "of which workload?"
    assert on.data.tags["hardware"]
    assert on.data.tags["mlflow.user"] == getpass.getuser()
    assert on.data.params == {
        "prefix_cache": "on",
        "cell": "prefix_cache=on",
        "engine": "tests.support.fake_engine",
    }
    assert (on.info.status, crash.info.status) == ("FINISHED", "FAILED")
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    asked = (
        f"tags.role = 'cell' and tags.gate = 'pass' and tags.`a/verdict` = 'faster' "
        f"and tags.evidence = 'intervals' and tags.hardware = '{on.data.tags['hardware']}'"
    )
    (found,) = client.search_runs([on.info.experiment_id], asked)
    assert found.info.run_id == on.info.run_id, "as people search over studies and machines"


def test_a_launch_has_few_columns_and_the_rest_in_a_file(execution: Path, root: Path) -> None:
    tracking.import_folder(execution / "out", execution / "report", root)
    launches = by_role(root)["launch"]
    on, failed = launches["b00-o02-prefix_cache=on"], launches["b00-o03-crash"]
    assert set(on.data.params) == {"cell", "block", "order"}
    columns = {name for name in on.data.metrics if not name.startswith("system/")}
    assert columns == {f"{w}/{n}" for w in "ab" for n in ("output_tokens_per_s", "ttft_p50_s")}
    details = json.loads((tracking._folder(root, on) / tracking.DETAILS).read_text())
    assert details["toggles"]["prefix_cache"]["engaged"] == 8
    assert (on.info.status, failed.info.status) == ("FINISHED", "FAILED")
    assert "crashes as told" in failed.data.tags["mlflow.note.content"]


def test_no_parameter_is_empty(execution: Path, root: Path) -> None:
    tracking.import_folder(execution / "out", execution / "report", root)
    found = runs(root)
    assert not [
        (run.info.run_name, name)
        for run in found
        for name, value in run.data.params.items()
        if value in ("", "None", "{}", "[]")
    ]


PUBLISHED = [
    "cpu-two-cores/embedded",
    "cpu-two-cores/compare-vllm",
    "h200/gpu-latency",
    "h200-x2/ablate",
]


def test_a_verdict_fits_its_column_of_eleven_characters() -> None:
    assert in_a_column("suggestive: slower") == "slower?"
    assert in_a_column("faster") == "faster"
    assert in_a_column(None) is None


def test_the_descriptions_say_what_a_question_mark_means() -> None:
    """Only where the table of runs shows one."""
    folder = provenance.ROOT / "reports" / "published" / "h100" / "ablate"
    plan, file = store.read_for_report(folder)
    analysis = analyse(file.records, plan, file.notes)
    marked = 0
    for cell in plan["cells"]:
        tags = cell_view(plan, cell, file.records, analysis).tags
        has_mark = any(said.endswith("?") for name, said in tags.items() if "/verdict" in name)
        note = tags.get("mlflow.note.content", "")
        assert ("`slower?` in the table" in note) == has_mark
        marked += has_mark
    assert 0 < marked < len(plan["cells"])
    note = study_view(plan, file.records, analysis).tags["mlflow.note.content"]
    assert "`faster?` and `slower?` in the table of runs stand for *suggestive*" in note
    assert "| suggestive: faster |" in note


def four_digits(value: float | None) -> float | None:
    """What MLflow shows of a number; the records have the exact one."""
    if value is None:
        return None
    return round(value) if value >= 1000 else float(f"{value:.4g}")


def as_the_page(ratio: float | None) -> float | None:
    """A ratio in the digits of the report."""
    return None if ratio is None else float(text.ratio(ratio).removeprefix("×"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_mlflow_shows_the_numbers_of_the_report(name: str) -> None:
    """Of real studies, each number that MLflow shows of a cell against the analysis that its report
    is rendered from.
    """
    plan, file = store.read_for_report(provenance.ROOT / "reports" / "published" / name)
    analysis = analyse(file.records, plan, file.notes)
    rates = {(row["cell"], row["workload"], row["metric"]): row for row in analysis["rates"]}
    effects = {(e["cell"], e["workload"]): e for e in analysis["effects"] if e["metric"] == RATE}
    compared = 0
    for cell in plan["cells"]:
        view = cell_view(plan, cell, file.records, analysis)
        shown = {point.key: point.value for point in view.metrics}
        for workload in plan["workloads"]:
            mean = rates[cell, workload, RATE]["mean"]
            assert shown.get(f"{workload}/output_tokens_per_s") == four_digits(mean)
            for short, key in (("ttft", "time_to_first_token"), ("tpot", "time_per_output_token")):
                mean = rates[cell, workload, f"{key}_p50_s"]["mean"]
                assert shown.get(f"{workload}/{short}_p50_s") == four_digits(mean)
            effect = effects.get((cell, workload))
            if effect is not None:
                for end, bound in (("", "ratio"), ("_low", "low"), ("_high", "high")):
                    assert shown.get(f"{workload}/speedup{end}") == as_the_page(effect[bound])
                compared += effect["ratio"] is not None
                if analysis["metric"]["key"] == RATE and effect["n"]:
                    assert view.tags[f"{workload}/verdict"] == in_a_column(text.verdict(effect))
        assert set(plan["study"]["factors"]) <= set(view.params)  # n/a for engines without them
    assert compared


def test_mlflow_says_what_the_page_says(tmp_path: Path) -> None:
    """The rows of the report's table, as people read them, against the numbers of the runs."""
    plan, file = store.read_for_report(provenance.ROOT / "reports" / "published" / PUBLISHED[0])
    analysis = analyse(file.records, plan, file.notes)
    page = render(plan, file.records, analysis, tmp_path)[0].read_text()
    for cell in plan["cells"]:
        view, row = cell_view(plan, cell, file.records, analysis), analysis["by_cell"][cell]
        shown = {point.key: point.value for point in view.metrics}
        for workload in plan["workloads"]:
            lines = [line for line in page.splitlines() if line.startswith(f"| `{workload}` |")]
            rate = text.number(shown[f"{workload}/output_tokens_per_s"])
            assert any(f" {rate} |" in line for line in lines)
            if f"{workload}/speedup_low" in shown:
                low, high = (shown[f"{workload}/speedup_{end}"] for end in ("low", "high"))
                says = [
                    f"| `{view.name}` |",
                    f" {text.ratio(shown[f'{workload}/speedup'])} |",
                    f" {text.interval(low, high)} |",
                    f" {row['verdicts'][workload]} |",
                ]
                assert any(all(part in line for part in says) for line in lines), says


def test_a_comparison_of_engines_shows_the_ratio_to_the_other_one() -> None:
    plan, file = store.read_for_report(provenance.ROOT / "reports" / "published" / PUBLISHED[1])
    analysis = analyse(file.records, plan, file.notes)
    shown = analysis["by_cell"]["all"]["metrics"]
    found = {
        entry["theirs"]: entry["effects"][RATE]
        for entry in analysis["comparisons"]
        if entry["ours"] == "all"
    }
    assert found
    for theirs, of_workloads in found.items():
        for workload, effect in of_workloads.items():
            assert shown[f"{workload}/speedup_over_{theirs}"] == effect["ratio"]
            assert shown[f"{workload}/speedup_over_{theirs}_low"] == effect["low"]


def test_what_an_optimization_gains_when_it_is_added_last_is_a_metric() -> None:
    """Of everything on but one; the speedup of that run over all off is not what the one gains."""
    plan, file = store.read_for_report(provenance.ROOT / "reports" / "published" / "h200/ablate")
    analysis = analyse(file.records, plan, file.notes)
    view = cell_view(plan, "all-but-cuda_graphs", file.records, analysis)
    shown = {point.key: point.value for point in view.metrics}
    assert shown["mixed/as_last"] == 10.8
    assert shown["mixed/speedup"] < 3
    assert "cuda_graphs, added last: mixed: ×10.8" in view.tags["mlflow.note.content"]
    everything = cell_view(plan, "all", file.records, analysis)
    assert not [point.key for point in everything.metrics if "as_last" in point.key]
    note = study_view(plan, file.records, analysis).tags["mlflow.note.content"]
    assert note.startswith(f"**{analysis['answer']['sentence']}**\n\nOutput: equivalent. ")
    assert "| mixed | cuda_graphs=on, added last | 10.8" in note
    assert "| all-but" not in note


def test_outputs_that_fail_the_gate_are_no_pass() -> None:
    """A launch whose outputs fail does not count; its cell says fail, and has no speedup."""
    plan, file = store.read_for_report(provenance.ROOT / "reports" / "published" / PUBLISHED[0])
    cell = "prefix_cache=on"
    digests = {
        work["tokens_digest"]
        for record in file.records
        if record["kind"] == "launch" and record["cell"] == cell
        for work in record["workloads"].values()
    }
    records: list[Any] = [
        {**record, "status": "fail", "reason": "as told"}
        if record["kind"] == "gate" and record["tokens_digest"] in digests
        else record
        for record in file.records
    ]
    view = cell_view(plan, cell, records, analyse(records, plan))
    assert (view.tags["gate"], view.tags["evidence"], view.metrics) == ("fail", "none", [])
    ungated = [record for record in records if record["kind"] != "gate"]
    view = cell_view(plan, cell, ungated, analyse(ungated, plan))
    assert view.tags["gate"] == "descriptive"


def test_every_gpu_has_its_series_and_its_summary() -> None:
    folder = provenance.ROOT / "reports" / "published" / "h200-x2" / "ablate"
    plan, file = store.read_for_report(folder)
    record = next(record for record in file.records if record["kind"] == "launch")
    view = launch_view(plan, record, file.records)
    for gpu in ("gpu_0", "gpu_1"):
        watts = [
            point.value for point in view.metrics if point.key == f"system/{gpu}_power_usage_watts"
        ]
        summary = view.details["telemetry"]["gpus"][gpu]["watts"]
        assert len(watts) > 3
        assert (summary["min"], summary["max"]) == (min(watts), max(watts))
    assert view.tags["hardware"].startswith("2 x NVIDIA H200")


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
    assert len(runs(root)) == 1 + 3 + 3
    (part / store.RECORDS).write_text("".join(lines))
    tracking.import_folder(part, None, root)
    assert len(runs(root)) == 1 + 4 + 8


def test_a_moved_repository_keeps_its_artifacts(execution: Path, root: Path) -> None:
    run_id, _ = tracking.import_folder(execution / "out", execution / "report", root)
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    location = client.get_experiment_by_name("fake").artifact_location
    assert location == "mlflow-artifacts:/fake"
    assert all(run.info.artifact_uri.startswith(f"{location}/") for run in runs(root))
    moved = root.with_name("moved")
    root.rename(moved)
    client = mlflow.MlflowClient(f"sqlite:///{moved / 'mlflow.db'}")
    folder = moved / "mlartifacts" / "fake" / run_id / "artifacts"
    assert {path.name for path in folder.iterdir()} == {
        "plan.json",
        "records.jsonl",
        "tokens.jsonl",
        "report",
    }
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
    assert len(runs(root)) == 1 + 3 + 3
    (killed / store.RECORDS).write_bytes(whole)
    tracking.import_folder(killed, execution / "report", root)
    assert tracking.import_folder(execution / "out", execution / "report", root)[1] is False
    assert len(runs(root)) == 1 + 4 + 8


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
    assert tracking.comparison(root) is None, "there is nothing to compare one study with"
    second = tracking.import_folder(other, None, root)[0]
    assert len(runs(root)) == 2 * (1 + 4 + 8)
    by_id = {run.info.run_id: run for run in runs(root)}
    ids = [by_id[run].info.experiment_id for run in (first, second)]
    assert ids[0] != ids[1]
    compared = str(tracking.comparison(root, "http://here"))
    query = urllib.parse.parse_qs(compared.partition("?")[2])
    assert compared.startswith("http://here/#/compare-experiments/")
    assert sorted(json.loads(query["experiments"][0])) == sorted(ids)
    assert query["orderByKey"] == ["metrics.`a/speedup`"], "by time, cells are folded away"
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    assert len(client.search_runs(ids, query["searchFilter"][0])) == 2 * 4


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
    with mlflow_ui(moved) as address:
        figure = f"{address}/get-artifact?path=report/figures/forest.svg&run_uuid={run_id}"
        with urllib.request.urlopen(figure, timeout=60) as answer:
            assert answer.read() == (execution / "report" / "figures" / "forest.svg").read_bytes()


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
    assert len(runs(tmp_path)) == 1 + 4 + 8


def test_the_link_finds_the_cells_of_a_study(execution: Path, root: Path) -> None:
    run_id, _ = tracking.import_folder(execution / "out", execution / "report", root)
    address = tracking.link(run_id, root)
    query = urllib.parse.parse_qs(address.partition("?")[2])
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fake").experiment_id
    assert f"/#/experiments/{experiment}/runs?" in address
    (key,) = query["viewStateShareKey"]
    view = json.loads(client.get_experiment(experiment).tags[f"mlflow.sharedViewState.{key}"])
    cells = client.search_runs([experiment], view["searchFilter"])
    assert len(cells) == 4
    assert view["orderByKey"] == "metrics.`a/speedup`"
    assert not view["orderByAsc"], "the fastest first"
    assert view["selectedColumns"] == [
        "metrics.`a/speedup`",
        *(f"tags.`{tag}`" for tag in ("gate", "a/CI", "a/verdict")),
    ]
    columns = {name.split("`")[1] for name in view["selectedColumns"] if "metrics" in name}
    assert columns <= {name for run in cells for name in run.data.metrics}
    assert query["workflowType"] == ["machine_learning"], "else MLflow shows the menu of GenAI"
    assert list(tracking.links(root)) == ["fake"]


def test_the_end_of_a_run_and_the_ui_print_the_link(
    execution: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link opens the table of that study; clicking the experiment would show MLflow's overview."""
    folder = root / "out"
    shutil.copytree(execution / "out", folder)
    shutil.copytree(execution / "report", folder / "report")
    for name in ("import_folder", "link", "links", "comparison"):
        real = getattr(tracking, name)
        monkeypatch.setattr(tracking, name, functools.partial(real, root=root))
    monkeypatch.setattr(run_of_a_plan, "render", lambda folder, verbose: None)
    console = Console(file=io.StringIO())
    run_of_a_plan.publish(folder, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "then open the table of this run:" in printed
    (link,) = re.findall(r"http://\S+/#/experiments/\d+/runs\?\S+", printed)
    assert "viewStateShareKey" in link
    first, line = ui.lines()
    assert first == "Configurations of each study, the fastest first:"
    assert line.split() == ["fake", tracking.links()["fake"]]
