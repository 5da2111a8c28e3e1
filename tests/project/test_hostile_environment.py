"""A shell that is against us: what the variables of other programs say changes no result and ends
nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.host import environment, provenance
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


def run(*command: str, hostile: bool = True) -> subprocess.CompletedProcess[str]:
    variables = HOSTILE if hostile else {}
    found = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **variables}
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


def test_an_engine_gives_the_same_tokens(tiny: Path) -> None:
    answers = [run("-c", ENGINE, hostile=hostile) for hostile in (True, False)]
    lines = [
        [line for line in answer.stdout.splitlines() if line.startswith("tokens")]
        for answer in answers
    ]
    assert lines[0] == lines[1] != [], answers[0].stderr


@pytest.mark.parametrize("command", [("validate", "embedded"), ("list",)])
def test_the_laboratory_answers(command: tuple[str, ...]) -> None:
    done = run("-m", "experiments", *command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_is_the_same_to_the_byte(tmp_path: Path) -> None:
    """Its own processes: what `execution.render` starts, with our variables set and others removed."""
    script = (
        "import sys; from pathlib import Path; from experiments.run import execution as e; "
        "e.REPORT = sys.argv[2]; e.render(Path(sys.argv[1]))"
    )
    for hostile in (True, False):
        done = run("-c", script, str(PUBLISHED), str(tmp_path / str(hostile)), hostile=hostile)
        assert done.returncode == 0, done.stderr
    html, plain = (tmp_path / str(hostile) / "report.html" for hostile in (True, False))
    assert html.read_bytes() == plain.read_bytes()
    committed = (PUBLISHED / "report" / "report.md").read_bytes()
    assert (tmp_path / "True" / "report.md").read_bytes() == committed


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
