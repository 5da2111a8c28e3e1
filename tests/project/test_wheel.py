"""The wheel holds all that the command `nanovllm` needs, and works in any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from experiments.host import provenance

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built and installed without a network into a folder of its own."""
    pytest.importorskip("hatchling", reason="`make setup` installs hatchling, which builds wheels")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", folder / "site", wheel], check=True)
    return folder


def nanovllm(installed: Path, cwd: Path, *arguments: str) -> str:
    cwd.mkdir(exist_ok=True)
    cache = os.environ.get("NANOVLLM_CACHE") or str(ROOT / ".cache" / "nanovllm")
    done = subprocess.run(
        [installed / "site" / "bin" / "nanovllm", *arguments],
        cwd=cwd,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(installed / "site"),
            "NANOVLLM_CACHE": cache,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_adds_two_names_and_leaves_out_what_is_published(installed: Path) -> None:
    (wheel,) = installed.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert top == {"nanovllm", "nanovllm_lab"}
    assert "nanovllm_lab/ablations/studies/embedded.yaml" in files
    assert "nanovllm_lab/experiments/study/profiles/cpu.yaml" in files
    assert "nanovllm_lab/reports/templates/report.html.j2" in files
    assert "nanovllm_lab/experiments/look/style.css" in files
    assert "nanovllm_lab/experiments/checking/check.html.j2" in files
    assert "nanovllm/models/merges.txt" in files
    assert "nanovllm/kernels/native/attention.cpp" in files
    assert "nanovllm/kernels/native/vec.h" in files
    assert not [name for name in files if "/published/" in name]


@pytest.mark.slow
def test_studies_are_listed_and_planned_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    listed = nanovllm(installed, tmp_path / "list", "list", "--profile", "h200")
    assert "embedded" in listed
    planned = nanovllm(
        installed, tmp_path / "plan", "ablate", "--dry-run", "--profile", "h200", "--study", "embedded", "--model", "tiny"
    )  # fmt: skip
    assert "launches (" in planned
    assert list((tmp_path / "list").iterdir()) == []
    assert list((tmp_path / "plan").iterdir()) == []


def test_its_runs_go_to_the_working_directory_and_its_code_is_that_of_the_clone(
    installed: Path, tmp_path: Path
) -> None:
    ask = (
        "import sys, json, nanovllm_lab; sys.path.insert(0, str(nanovllm_lab.HOME)); "
        "from experiments.run import execution; from experiments.host import provenance; "
        "print(json.dumps([str(execution.RUNS), provenance.code_digest(), provenance.git_state()]))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(installed / "site")}
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    runs, digest, git = json.loads(done.stdout)
    assert Path(runs) == tmp_path / "runs"
    assert digest == provenance.code_digest()
    assert git is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_runs_and_is_reported_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(
        "name: short\nfactors: {batching: {levels: chunked}}\nmodel: {preset: tiny, dtype: float32}\n"
        "workloads: {short: {kind: random, num_requests: 4}}\n"
        "validity: {max_foreign_cpu: 1}\ndesign: {blocks: 2}\n"
    )
    out = nanovllm(installed, tmp_path, "ablate", "--study", "short.yaml", "--profile", "cpu")
    assert "batching=chunked" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "report" / "report.html").is_file()
    assert (tmp_path / "mlflow.db").is_file()
    assert folder.name in nanovllm(installed, tmp_path, "list", "--profile", "h200")
