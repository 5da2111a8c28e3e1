"""Tried as a new user would: the study of "Your own question", copied from its page, runs and is
reported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.study import spec
from tests.docs.pages import blocks

ROOT = Path(__file__).parents[2]


def study_of_the_page() -> str:
    """The YAML of docs/your-own-question.md."""
    return next(iter(blocks("docs/your-own-question.md", "yaml")))


def test_the_study_of_the_page_is_short_and_valid(tmp_path: Path) -> None:
    path = tmp_path / "my-question.yaml"
    path.write_text(study_of_the_page())
    assert len(path.read_text().splitlines()) <= 5
    study, _ = spec.load_study(path)
    assert set(study.factors) == {"batching"}


def test_three_lines_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text(
        "name: short\nfactors: {batching: {levels: chunked}}\nworkloads: {short: {kind: random}}\n"
    )
    study, _ = spec.load_study(path)
    assert study.measurement.environment == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert study.title == "short"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_study_of_the_page_runs_and_is_reported(tmp_path: Path) -> None:
    """In a copy of the tree, so that its runs and its MLflow are its own; fewer blocks and requests
    than the page has.
    """
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(
        ".*", "runs", "mlflow*", "mlartifacts", "published", "__pycache__", "shared"
    )
    shutil.copytree(ROOT, tree, ignore=left_out)
    (tree / "my-question.yaml").write_text(study_of_the_page())
    name = yaml.safe_load(study_of_the_page())["name"]
    environment = {
        **os.environ,
        "PYTHONPATH": "src:.",
        "NANOVLLM_CACHE": str(ROOT / ".cache" / "nanovllm"),
    }

    def experiments(*arguments: str) -> str:
        command = [sys.executable, "-m", "experiments", *arguments]
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert "launches" in experiments("validate", "my-question.yaml")
    small = [
        "--blocks",
        "2",
        "--set",
        "workloads.long.num_requests=6",
        "--set",
        "validity.max_foreign_cpu=1",
    ]
    assert "expected" in experiments("run", "--study", "my-question.yaml", *small, "--dry-run")
    assert not (tree / "runs").exists()
    out = experiments("ablate", "--study", "my-question.yaml", *small)
    assert "batching=chunked" in out
    (folder,) = (tree / "runs").iterdir()
    report = (folder / "report" / "report.md").read_text()
    analysis = json.loads((folder / "report" / "analysis.json").read_text())
    assert (analysis["counts"]["counted_launches"], analysis["counts"]["excluded_launches"]) == (
        8,
        0,
    )
    assert analysis["gate"]["passed"] == len(analysis["gate"]["rows"]) > 0
    assert analysis["answer"]["sentence"].split(",")[0] in report
    assert (tree / "mlflow.db").exists()
    (environment_report,) = folder.glob("environment-*.txt")
    assert environment_report.name in (folder / "records.jsonl").read_text()
    assert name in experiments("list")
