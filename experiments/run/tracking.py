"""Writes MLflow runs from records. Records are the source of truth: the runs can be rebuilt from
them at any time, with the same result.

The store is `sqlite:///mlflow.db` at the repository's root, as a plain `mlflow ui` there uses it.
Artifacts have locations `mlflow-artifacts:/...`, which the server finds under its working
directory, in `mlartifacts/`: the repository can be moved. There is one experiment per study, one
run per execution (a folder of records), below it one per cell, and below that one per launch.
Imports take a lock, because concurrent initialization of an SQLite file fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from filelock import FileLock

from experiments.host.environment import WORKPLACE
from experiments.records import store
from experiments.records.types import JsonObject, Plan, PlannedStudy, Record
from experiments.run.mlflow_view import (
    ADDED_LAST,
    ALL_WORKLOADS,
    View,
    cell_view,
    experiment_note,
    launch_view,
    study_view,
)

ARTIFACTS, DATABASE = "mlartifacts", "mlflow.db"
PROXIED = "mlflow-artifacts"
"""The scheme of artifacts that the server serves from its own folder, which is `ARTIFACTS`."""
EXECUTION, DIGEST = "nanovllm.execution", "nanovllm.records_digest"
PARENT = "mlflow.parentRunId"
DETAILS = "details.json"
"""The artifact of a cell or launch that holds what is no column of the runs table."""
ADDRESS = "http://127.0.0.1:5000"
"""Where `make ui` and a plain `mlflow ui` listen."""
TRAINING = "workflowType=machine_learning"
"""Has MLflow's pages show the menu of training runs instead of the one of GenAI applications (3.17)."""
SHARED_VIEW, MOST_COLUMNS = "mlflow.sharedViewState", 6
"""The tag of a stored view; and how many columns of the runs table, beside the gate, fit a window of a
desk."""
CELLS, SPEEDUP, _BY_NAME = "tags.role = 'cell'", "/speedup", "attributes.run_name"
_VIEW_VERSION = 5
"""Raise it when the shape of the runs changes: an import then replaces what an older version wrote."""


class TrackingError(Exception):
    """An import that failed; the message says what to do."""


def import_folder(
    folder: Path, report: Path | None = None, root: Path = WORKPLACE
) -> tuple[str, bool]:
    """Imports the records of a folder into MLflow: (id of the parent run, whether runs were
    written).

    Importing the same records again writes nothing; runs of an interrupted import or of an older
    state of the folder are replaced. report: a folder with analysis.json and the rendered report;
    its verdicts become the description of the run. Raises RecordError, and TrackingError for any
    error of MLflow, its database or the disk.
    """
    plan, found = store.read_plan(folder / store.PLAN), store.read(folder)
    if not any(record["kind"] == "launch" for record in found):
        raise TrackingError(f"{folder}: no launch is recorded yet; run the study first")
    analysis = store.read_json(report / "analysis.json") if report else None
    with _errors_explained(root):
        return _import(folder, report, root, plan, found, analysis)


def objection(root: Path = WORKPLACE) -> str | None:
    """Why an import into `root` would fail, as far as can be known beforehand; None if nothing
    speaks against it.
    """
    try:
        _check_writable(root)
        client = _client(root)
        if (root / DATABASE).exists():  # else its tables are made with the first import
            client.search_experiments(max_results=1)
    except TrackingError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  whatever MLflow or SQLAlchemy raise
        return _explained(error, root)
    return None


def link(run_id: str, root: Path = WORKPLACE, address: str = ADDRESS) -> str:
    """The address of the runs table with the cells of an execution, given the id of its run. Raises
    TrackingError.
    """
    with _errors_explained(root):
        client = _client(root)
        experiment = client.get_run(run_id).info.experiment_id
        return _table(client, experiment, f"tags.`{PARENT}` = '{run_id}'", address)


def links(root: Path = WORKPLACE, address: str = ADDRESS) -> dict[str, str]:
    """{study: address of the runs table with its cells, of all executions}, the latest study first.
    Raises TrackingError.
    """
    if not (root / DATABASE).exists():
        return {}
    with _errors_explained(root):
        client = _client(root)
        return {
            name: _table(client, experiment, CELLS, address)
            for experiment, name in _studies(client).items()
        }


def comparison(root: Path = WORKPLACE, address: str = ADDRESS) -> str | None:
    """The address of MLflow's comparison of all studies: a chart for each metric, with a bar for each
    cell. None with fewer than two studies. Raises TrackingError.
    """
    if not (root / DATABASE).exists():
        return None
    with _errors_explained(root):
        client = _client(root)
        studies = list(_studies(client))
        if len(studies) < 2:
            return None
        cells = client.search_runs(studies, CELLS)
        named = [name for run in cells for name in run.data.metrics if name.endswith(SPEEDUP)]
        # by time, MLflow would fold the cells into their study
        order = f"metrics.`{Counter(named).most_common(1)[0][0]}`" if named else _BY_NAME
        view = {
            "experiments": json.dumps(studies, separators=(",", ":")),
            "searchFilter": CELLS,
            "orderByKey": order,
            "orderByAsc": "false",
            "compareRunsMode": "CHART",
        }
        return f"{address}/#/compare-experiments/s?{urlencode(view, quote_via=quote)}&{TRAINING}"


def _studies(client: Any) -> dict[str, str]:
    """{id of the experiment: study}, the latest study first."""
    by_id = {found.experiment_id: found.name for found in client.search_experiments()}
    runs = client.search_runs(
        list(by_id), "tags.role = 'study'", order_by=["attributes.start_time DESC"]
    )
    return {run.info.experiment_id: by_id[run.info.experiment_id] for run in runs}


@contextmanager
def _errors_explained(root: Path) -> Iterator[None]:
    """Whatever MLflow, SQLAlchemy or the disk raise becomes a TrackingError that says what to do."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(_explained(error, root)) from error


def _table(client: Any, experiment: str, search: str, address: str) -> str:
    """The page of an experiment's runs, filtered, sorted by speedup, and with columns for the speedup
    on each workload, its interval, its verdict, and the gate. In its usual order, by time, MLflow folds
    cells into the run of their study.

    The view is stored as MLflow's own "Share view" stores it, in a tag of the experiment. A version
    of MLflow that does not know it shows all runs.
    """
    cells = client.search_runs([experiment], search, max_results=100)
    named = {name for run in cells for name in run.data.metrics}
    speedups = sorted(name for name in named if name.endswith(SPEEDUP))
    order = f"metrics.`{speedups[0]}`" if speedups else _BY_NAME
    # MLflow shows tags after metrics, both by name. A column holds 14 characters: an interval is a
    # tag, "0.644–0.920", where its ends would be two metrics with names that are cut. The verdicts
    # come last, so what would push them off the window is left out.
    of_workloads = [name for name in speedups if name != f"{ALL_WORKLOADS}{SPEEDUP}"] or speedups
    last = sorted(name for name in named if name.endswith(ADDED_LAST))
    metrics, tags = of_workloads, ["gate"]
    for kinds, more in ((("CI", "verdict"), last), (("verdict",), last), (("verdict",), [])):
        asked = [f"{name.removesuffix(SPEEDUP)}/{kind}" for name in of_workloads for kind in kinds]
        if len(of_workloads) + len(more) + len(asked) <= MOST_COLUMNS:
            metrics, tags = of_workloads + more, tags + asked
            break
    columns = [f"metrics.`{name}`" for name in metrics] + [f"tags.`{tag}`" for tag in tags]
    view = {
        "searchFilter": search,
        "orderByKey": order,
        "orderByAsc": not speedups,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": columns,
    }
    key = hashlib.sha256(search.encode()).hexdigest()[:12]
    client.set_experiment_tag(experiment, f"{SHARED_VIEW}.{key}", json.dumps(view))
    return f"{address}/#/experiments/{experiment}/runs?viewStateShareKey={key}&{TRAINING}"


def _explained(error: Exception, root: Path) -> str:
    """The error of MLflow, SQLAlchemy or the file system, and what to do about it."""
    said = (str(error).strip().splitlines() or [""])[0][:300]
    return (
        f"{root / DATABASE}: {type(error).__name__}: {said}. If another version of MLflow wrote it, use that version, "
        f"`mlflow db upgrade sqlite:///{DATABASE}`, or move it away"
    )


def _check_writable(root: Path) -> None:
    for path in (root, root / DATABASE, root / f"{DATABASE}.lock", root / ARTIFACTS):
        if path.exists() and not os.access(path, os.W_OK):
            raise TrackingError(f"{path} is not writable; use a writable copy of the repository")


def _import(
    folder: Path,
    report: Path | None,
    root: Path,
    plan: Plan,
    found: list[Record],
    analysis: JsonObject | None,
) -> tuple[str, bool]:
    _check_writable(root)
    execution, digest = _identity(found, analysis)
    with FileLock(root / f"{DATABASE}.lock"):
        client = _client(root)
        experiment = _experiment(client, plan["study"])
        existing = client.search_runs(
            [experiment], f"tags.`{EXECUTION}` = '{execution}'", max_results=50_000
        )
        study = next((run for run in existing if run.data.tags.get(DIGEST) == digest), None)
        fresh = study is None
        if study is None:
            for run in existing:
                client.delete_run(run.info.run_id)
            study = _write_all(
                client, experiment, root, plan, found, analysis, {EXECUTION: execution}
            )
        run_id = str(study.info.run_id)
        _copy_artifacts(_folder(root, study), folder, report)
        if fresh:
            note = experiment_note(plan, analysis)
            client.set_experiment_tag(experiment, "mlflow.note.content", note)
            client.set_tag(run_id, DIGEST, digest)  # last: an import without it was interrupted
    return run_id, fresh


def _write_all(
    client: Any,
    experiment: str,
    root: Path,
    plan: Plan,
    found: list[Record],
    analysis: JsonObject | None,
    tags: dict[str, str],
) -> Any:
    """The runs of an execution; returns that of the study."""
    study = _write(client, experiment, root, study_view(plan, found, analysis), tags)
    cells: dict[str, Any] = {}
    for record in found:
        if record["kind"] != "launch":
            continue
        cell = record["cell"]
        if cell not in cells:
            below = {**tags, PARENT: study.info.run_id}
            view = cell_view(plan, cell, found, analysis)
            cells[cell] = _write(client, experiment, root, view, below)
        below = {**tags, PARENT: cells[cell].info.run_id}
        _write(client, experiment, root, launch_view(plan, record, found), below)
    return study


def _identity(found: list[Record], analysis: JsonObject | None) -> tuple[str, str]:
    """(id of the execution, digest of what its runs show). The id is of the first launch, which
    never changes; other records may be added.
    """
    first = next(record for record in found if record["kind"] == "launch")
    shown = json.dumps(
        [
            _VIEW_VERSION,
            found,
            analysis and [analysis["answer"], analysis["effects"], analysis["by_cell"]],
        ],
        sort_keys=True,
    )
    return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[
        :16
    ], hashlib.sha256(shown.encode()).hexdigest()


def _client(root: Path) -> Any:
    """A client of mlflow.db. Raises TrackingError if a plain `mlflow ui` would use another store."""
    stray = [path.parent for path in root.glob("mlruns/*/meta.yaml") if path.parent.name.isdigit()]
    if stray:
        raise TrackingError(
            f"because of {stray[0]}, MLflow uses {root / 'mlruns'} as its store and ignores mlflow.db: move {root / 'mlruns'} away"
        )
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # or SQLAlchemy would decode a %2F of the path, and end it at a question mark
    quoted = Path(quote(str(root)))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{quoted / DATABASE}")
    if quoted != root:
        with suppress(OSError):
            quoted.rmdir()  # MLflow makes the folder that it reads there
    return client


def _experiment(client: Any, study: PlannedStudy) -> str:
    """The id of a study's experiment, which is created or restored if necessary."""
    experiment = client.get_experiment_by_name(study["name"])
    if experiment is None:
        client.create_experiment(
            study["name"],
            artifact_location=f"{PROXIED}:/{quote(study['name'], safe='')}",
        )
        experiment = client.get_experiment_by_name(study["name"])
    elif experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _folder(root: Path, run: Any) -> Path:
    """Where the artifacts of a run lie. A client of the database cannot ask: the server knows."""
    location = urlsplit(run.info.artifact_uri)
    if location.scheme == PROXIED and not location.netloc:
        return root / ARTIFACTS / location.path.lstrip("/")
    if location.scheme in ("", "file"):  # by an older version, or an experiment made by hand
        return root / unquote(location.path)
    raise TrackingError(
        f"the artifacts of experiment {run.info.experiment_id} lie at {run.info.artifact_uri}, where an import "
        "cannot write: rename the experiment"
    )


def _write(client: Any, experiment: str, root: Path, view: View, tags: dict[str, str]) -> Any:
    """One finished run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    run = client.create_run(
        experiment,
        start_time=_milliseconds(view.started_at),
        run_name=view.name,
        tags={**view.tags, **tags},
    )
    metrics = [
        Metric(m.key, m.value, _milliseconds(view.started_at) + int(m.time_s * 1000), m.step)
        for m in view.metrics
    ]
    for first in range(
        0, max(1, len(metrics)), 1000
    ):  # MLflow's limits per batch: 1,000 metrics, 100 params
        params = (
            [Param(key, str(value)[:6000]) for key, value in view.params.items()][:100]
            if first == 0
            else []
        )
        client.log_batch(run.info.run_id, metrics=metrics[first : first + 1000], params=params)
    inputs = [
        DatasetInput(
            Dataset(
                name=name,
                digest=entry["fingerprint"][:36],
                source_type="code",
                source=json.dumps({"kind": entry["kind"]}),
                profile=json.dumps(
                    {
                        **{
                            key: entry[key]
                            for key in ("num_requests", "prompt_tokens", "output_tokens")
                        },
                        "params": {
                            key: value
                            for key, value in entry["params"].items()
                            if key != "content"  # of a file: long, and no text
                        },
                    }
                ),
            ),
            [InputTag("mlflow.data.context", "workload")],
        )
        for name, entry in view.workloads.items()
    ]
    if inputs:
        client.log_inputs(run.info.run_id, inputs)
    if view.details:
        target = _folder(root, run)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(view.details, indent=1)
        (target / DETAILS).write_text(text + "\n", encoding="utf-8")
    client.set_terminated(
        run.info.run_id, view.status, _milliseconds(view.started_at) + int(view.duration_s * 1000)
    )
    return client.get_run(run.info.run_id)


def _copy_artifacts(target: Path, folder: Path, report: Path | None) -> None:
    """Copies records and report to the run's artifacts. A client would resolve the relative path
    against its working directory.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in (
        store.PLAN,
        store.RECORDS,
        store.TOKENS,
        *(path.name for path in folder.glob(store.ENVIRONMENTS)),
    ):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    if report:
        shutil.copytree(report, target / "report", dirs_exist_ok=True)


def _milliseconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)
