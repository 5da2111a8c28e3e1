"""A shell that is against us: what the variables of other programs say changes no result and ends
nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.host import environment, provenance
from experiments.run import execution
from reports.page.render import HTML, MARKDOWN
from tests.run.test_preflight import PUBLISHED

ROOT = Path(__file__).parents[2]
# ASCII, with all of Python's help against it off
LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
HOSTILE = {
    **LOCALE,
    "LANGUAGE": "tr",
    "MPLBACKEND": "module://nothing",
    "GIT_DIR": "/dev/null/nowhere/.git",
    "GIT_WORK_TREE": "/dev/null/nowhere",
    "CI": "true",
    "OMP_NUM_THREADS": "1",
    "TORCH_LOGS": "recompiles",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "10",
    "NO_COLOR": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TMPDIR": "/dev/null/nowhere",
    "HOME": "/dev/null/nowhere",
    "MLFLOW_TRACKING_URI": "http://nowhere",
    "MLFLOW_RUN_ID": "abc",
}
ENGINE = r"""
from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint import ensure_checkpoint
with LLM(ensure_checkpoint("tiny"), max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=1 << 22) as llm:
    print("tokens", llm.generate(["h\u00e9"], SamplingParams(temperature=1, max_tokens=8), use_tqdm=False)[0].outputs[0].token_ids)
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    found = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **HOSTILE}
    found.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=found,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


def test_an_engine_gives_the_same_tokens(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in this process, which has a friendly environment."""
    exec(compile(ENGINE, "engine", "exec"), {})
    answer = run("-c", ENGINE)
    here, there = (
        [line for line in said.splitlines() if line.startswith("tokens")]
        for said in (capsys.readouterr().out, answer.stdout)
    )
    assert there == here != [], answer.stderr


@pytest.mark.parametrize("command", [("validate", "embedded"), ("list",)])
def test_the_laboratory_answers(command: tuple[str, ...]) -> None:
    done = run("-m", "experiments", *command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_is_the_same_to_the_byte(
    tmp_path: Path, rendered: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own processes: what `execution.render` starts, with our variables set and others removed.
    As in this process, and as committed.
    """
    here = rendered("cpu-two-cores/embedded")
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(execution, "REPORT", str(tmp_path / "there"))
    execution.render(PUBLISHED)
    assert (tmp_path / "there" / HTML).read_bytes() == (here / HTML).read_bytes()
    committed = (PUBLISHED / "report" / MARKDOWN).read_bytes()
    assert (tmp_path / "there" / MARKDOWN).read_bytes() == committed


def test_children_are_told_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**HOSTILE, "PYTHONINSPECT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/theirs{os.pathsep}")
    found = environment.for_subprocess({"OMP_WAIT_POLICY": "PASSIVE"})
    assert not set(environment.REMOVED) & set(found)
    assert {name: found[name] for name in environment.SET} == environment.SET
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "src"), "/theirs"]
    assert found["OMP_WAIT_POLICY"] == "PASSIVE"
    recorded = provenance.of_interpreter()["environment"]
    for name in (
        "LC_ALL",
        "OMP_NUM_THREADS",
        "TORCH_LOGS",
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_OFFLINE",
        "PYTHONOPTIMIZE",
        "TMPDIR",
    ):
        assert recorded[name] == HOSTILE[name]
