"""Two places, one study: planned here, measured on a host that has the engine only, on several
visits, imported here.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import experiments.__main__ as cli
from experiments.launch import runner
from experiments.records import store
from experiments.run import tracking
from tests.support.fake_engine import ENVIRONMENT, LABORATORY, without

STUDY = """
name: two-places
factors: {batching: {levels: [chunked]}}
workloads: {small: {kind: random, num_requests: 4, prompt_tokens: [4, 8], output_tokens: [2, 8], temperature: 0.6}}
settings: {max_num_seqs: 4, max_num_batched_tokens: 256, max_model_len: 256, block_size: 16, kv_cache_memory_bytes: 33554432}
model: {preset: tiny, dtype: float32}
design: {kind: one_at_a_time, blocks: 2, seed: 1}
measurement: {environment: {OMP_NUM_THREADS: "1"}}
"""


def home(*arguments: str) -> Any:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow and alembic deprecate things of their own
@pytest.mark.timeout(600)
def test_a_study_planned_here_and_measured_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    study, plan_file = tmp_path / "two-places.yaml", tmp_path / "plan.json"
    study.write_text(STUDY)
    said = home("run", "--study", str(study), "--dry-run", "--write-plan", str(plan_file))
    assert "python -m experiments.launch --plan plan.json --out DIR --resume" in said.output
    host = without(tmp_path / "hook", *LABORATORY, "transformers")

    def visit(out: Path, *options: str) -> int:
        command = [
            sys.executable,
            "-m",
            "experiments.launch",
            "--plan",
            str(plan_file),
            "--out",
            str(out),
            "--resume",
            *options,
        ]
        done = subprocess.run(command, env=host, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert "records.jsonl" in done.stderr, "it says what to carry"
        return done.returncode

    # The first visit ends by its deadline, the second goes on in the same folder, the third, with
    # an empty one, takes block 1.
    assert visit(tmp_path / "first", "--blocks", "0", "--deadline-s", "0") == runner.DEADLINE_STATUS
    assert visit(tmp_path / "first", "--blocks", "0") == 0
    assert visit(tmp_path / "second", "--blocks", "1") == 0
    plan = store.read_plan(plan_file)
    found = [r for part in ("first", "second") for r in store.counted(store.read(tmp_path / part))]
    assert [r["launch"] for r in found] == [entry["launch"] for entry in plan["launches"]]
    assert all(
        r["toggles"]["batching"]["engaged"] > 0 for r in found if r["cell"] == "batching=chunked"
    )

    gate = "import sys; from experiments.gate import main; sys.exit(main(sys.argv[1:]))"
    for part in ("first", "second"):
        options = ["--plan", str(plan_file), "--out", str(tmp_path / part)]
        subprocess.run([sys.executable, "-c", gate, *options], env=ENVIRONMENT, check=True)
    monkeypatch.setattr(
        cli, "import_folder", functools.partial(tracking.import_folder, root=tmp_path)
    )
    visits = [str(tmp_path / "first"), str(tmp_path / "second")]
    said = home("import", *visits, "--merge", str(tmp_path / "merged"))
    assert "written" in said.output
    assert "already up to date" in home("import", str(tmp_path / "merged")).output
    analysis = json.loads((tmp_path / "merged" / "report" / "analysis.json").read_text())
    assert (
        next(effect["n"] for effect in analysis["effects"] if effect["cell"] == "batching=chunked")
        == 2
    )
