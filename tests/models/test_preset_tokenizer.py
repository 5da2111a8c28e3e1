"""The presets' tokenizer: the same with every Python, and as it was learned."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

from experiments.launch.runner import Runner
from experiments.records.store import RecordError
from nanovllm.models import checkpoint
from tests.support.fake_engine import make_plan

LEARNED_FROM = ("this", "heapq", "difflib", "optparse", "pickletools")


def source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def test_it_does_not_depend_on_the_python_that_runs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.13 changed pickletools.py: nothing of the standard library is read."""
    monkeypatch.setattr(importlib.util, "find_spec", pytest.fail)
    assert checkpoint.tokenizer_digest(checkpoint.make_tokenizer()) == checkpoint.TOKENIZER_DIGEST
    assert (
        checkpoint.tokenizer_digest(Tokenizer.from_file(str(tiny / "tokenizer.json")))
        == checkpoint.TOKENIZER_DIGEST
    )


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="its pickletools.py is another text")
def test_the_merges_are_those_of_the_standard_library() -> None:
    ours = checkpoint.make_tokenizer()
    learner = Tokenizer(BPE())
    learner.normalizer, learner.pre_tokenizer = ours.normalizer, ours.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=checkpoint.TEXT_SIZE, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(map(source, LEARNED_FROM), trainer)
    assert learner.get_vocab() == ours.get_vocab(with_added_tokens=False)


def test_a_library_that_splits_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "TOKENIZER_DIGEST", "0" * 64)
    with pytest.raises(RuntimeError, match="splits text otherwise"):
        checkpoint.ensure_checkpoint(
            "tiny", cache_dir=tmp_path, num_hidden_layers=1, vocab_size=2048
        )


def test_another_tokenizer_does_not_go_on_with_a_study(tmp_path: Path) -> None:
    """The plan's digest covers config and weights; what lies beside them is recorded, and checked
    when a run is resumed.
    """
    plan = make_plan(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        runner.run([0])
        recorded = runner.ledger.folder.records[-1]["provenance"]["model_files"]
    assert recorded["tokenizer.json"] is not None
    assert recorded["generation_config.json"] is None
    (tmp_path / "model" / "tokenizer.json").write_text("{ }")
    with pytest.raises(
        RecordError, match=r"tokenizer\.json has changed since b00-o00-baseline ran"
    ):
        Runner(plan, tmp_path / "out", resume=True)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        assert runner.pending()
