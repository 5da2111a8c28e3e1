"""The worked examples of the pages, as they stand there: extracted, and run on a CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from experiments import engines, workloads
from experiments.__main__ import app
from tests.docs.pages import ROOT, block, blocks


def experiments(*arguments: str) -> str:
    """`python -m experiments ...`, in this process. Its output, lines joined."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def save(folder: Path, text: str) -> Path:
    path = folder / f"{yaml.safe_load(text)['name']}.yaml"
    path.write_text(text)
    return path


def test_the_script_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = blocks("README.md", "python")
    assert len(script.splitlines()) == 10
    exec(compile(script, "README.md", "exec"), {"__name__": "readme"})
    *answers, toggles = capsys.readouterr().out.splitlines()
    assert len(answers) >= 2
    assert "'prefix_cache': {'level': True" in toggles


def test_the_readme_is_short_and_its_table_is_small() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    table = text.partition("## Results")[2].partition("## ")[0]
    assert 4 <= len(re.findall(r"(?m)^\| (?!---|comparison)", table)) <= 8


def test_every_make_target_of_the_pages_exists() -> None:
    known = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/quick-start.md",
        "docs/your-own-question.md",
    ):
        for line in "\n".join(blocks(page, "bash")).splitlines():
            if line.startswith("make "):
                targets = re.findall(r"(?<= )[a-z][a-z-]+(?= |$)", line.partition("#")[0])
                assert targets, line
                assert set(targets) <= known, line


@pytest.fixture
def bursts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """experiments.workloads with the page's kind added at its end."""
    monkeypatch.setattr(workloads, "DEFAULTS", dict(workloads.DEFAULTS))
    monkeypatch.setattr(workloads, "_GENERATORS", dict(workloads._GENERATORS))
    scope = dict(vars(workloads))
    exec(compile(block("docs/extending/workload.md", "python", "DEFAULTS["), "page", "exec"), scope)
    return scope


def test_a_workload(bursts: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(block("docs/extending/workload.md", "python", "def test_"), scope)
    (test,) = [value for name, value in scope.items() if name.startswith("test_")]
    test()

    study = save(tmp_path, *blocks("docs/extending/workload.md", "yaml"))
    assert "bursts" in experiments("validate", str(study), "--profile", "cpu")

    params = {"num_bursts": 2, "requests_per_burst": 2, "prompt_tokens": 5, "output_tokens": 3}
    adapter = engines.load_adapter("nanovllm")(str(tiny), {"dtype": "float32", "device": "cpu"})
    adapter.load()
    try:
        for wave in workloads.build("b", "bursts", params)["waves"]:
            assert [len(output) for output in adapter.serve(wave)["outputs"]] == [3, 3]
    finally:
        adapter.close()


def test_an_engine(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    code = block("docs/extending/engine.md", "python", "class Adapter")
    (package / "my_engine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)

    study = save(tmp_path, *blocks("docs/extending/engine.md", "yaml"))
    assert "compare-my-engine" in experiments("validate", str(study), "--profile", "cpu")

    params = {"num_requests": 3, "prompt_tokens": [3, 9], "output_tokens": [2, 6], "temperature": 0}
    (wave,) = workloads.build("w", "random", params)["waves"]
    config = {"dtype": "float32", "device": "cpu", "kv_cache_memory_bytes": 2**22}
    served = []
    for name in ("my_package.my_engine", "nanovllm"):
        adapter = engines.load_adapter(name)(str(tiny), config)
        resolved = adapter.load()
        assert resolved["kv_cache_bytes"] <= 2**22
        served.append(adapter.serve(wave))
        adapter.reset()
        adapter.close()
    assert served[0]["outputs"] == served[1]["outputs"]
    assert served[0]["finish_reasons"] == ["length"] * 3
    with pytest.raises(ValueError, match="unknown config key"):
        engines.load_adapter("my_package.my_engine")(str(tiny), {"no_such_key": 1})


def test_hardware(tmp_path: Path) -> None:
    profile = save(tmp_path, *blocks("docs/extending/hardware.md", "yaml"))
    plan = tmp_path / "plan.json"
    said = experiments(
        "run",
        "--study",
        "gpu-ablate",
        "--profile",
        str(profile),
        "--model",
        "tiny",
        "--dry-run",
        "--write-plan",
        str(plan),
    )
    assert "NVIDIA GeForce RTX 4090, 24 GB: 1,008 GB/s, 165 TFLOP/s, stated in the profile" in said
    assert json.loads(plan.read_text())["profile"]["name"] == "rtx4090"


@pytest.mark.parametrize("page", ["toggle", "model-family"])
def test_a_change_of_the_engine(page: str, tmp_path: Path) -> None:
    """The page's files and diffs are applied to a copy of the source; its test and its study run
    there.
    """
    page = f"docs/extending/{page}.md"
    for name in ("src", "experiments", "ablations"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    text = (ROOT / page).read_text()
    for path, code in re.findall(r"(?ms)^New file `([^`]+)`:\n\n```python\n(.*?)^```$", text):
        (tmp_path / path).write_text(code)
    for diff in blocks(page, "diff"):
        run("git", "apply", "--unidiff-zero", "-", folder=tmp_path, given=diff)
    (tmp_path / "test_page.py").write_text(block(page, "python", "\ndef test_"))
    studies = [str(save(tmp_path, study)) for study in blocks(page, "yaml")]
    run(sys.executable, "-c", TEST_AND_STUDIES, *studies, folder=tmp_path)


TEST_AND_STUDIES = """
import sys, pytest
from experiments.__main__ import app
if status := pytest.main(["-q", "-p", "no:cacheprovider", "test_page.py"]):
    sys.exit(status)
for study in sys.argv[1:]:
    app(["validate", study], standalone_mode=False)
"""
"""What a reader types, in one process: `python -m pytest test_page.py`, `python -m experiments validate ...`."""


def run(*command: str, folder: Path, given: str | None = None) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": "src:.",
        "OMP_NUM_THREADS": "1",
        "NANOVLLM_CACHE": str(ROOT / ".cache" / "nanovllm"),
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
