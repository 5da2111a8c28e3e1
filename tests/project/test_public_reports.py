"""Reports of other engines and harnesses, tried here; docs/public-reports.md lists them with what
is done.
"""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.launch.engine_process import wrong_work
from experiments.run import tracking
from nanovllm import BASELINE, LLM, SamplingParams
from nanovllm.models.checkpoint import ensure_checkpoint

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 22}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Any:
    with LLM(str(tiny), **SMALL) as engine:
        yield engine


def test_the_page_names_only_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "public-reports.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) >= 30
    for file, test in re.findall(r"`((?:tests|property_tests)/\w+\.py)(?:::(\w+))?`", page):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert test == "" or f"def {test}(" in text, (file, test)


def test_a_prompt_as_long_as_the_limit_is_refused_and_one_shorter_runs(llm: LLM) -> None:
    """vLLM 16445, lm-evaluation-harness 2880."""
    with pytest.raises(
        ValueError, match=r"64 prompt tokens, which leaves no room.*max_model_len=64"
    ):
        llm.generate([[5] * 64], SamplingParams(max_tokens=1), use_tqdm=False)
    (output,) = llm.generate([[5] * 63], SamplingParams(max_tokens=1), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1


@pytest.mark.parametrize(
    "bad",
    [
        [5] * 200,
        [],
        [5279552648203111001],
        [-1],
        [2048],
        "",
        ["a"],
        {"prompt": [1, [2]]},
        None,
        5.5,
    ],
)
def test_one_bad_prompt_names_itself_and_costs_nothing(llm: LLM, bad: Any) -> None:
    """vLLM 1655 (three outputs for two prompts), 276, 765 (it hung), 26797, 11375; lighteval 1209
    (only the first was checked).
    """
    for place in (0, 1, 2):
        prompts: list[Any] = [[1, 2], [3, 4]]
        prompts.insert(place, bad)
        with pytest.raises((ValueError, TypeError)):
            llm.generate(prompts, GREEDY, use_tqdm=False)
    assert not llm.has_unfinished_requests()
    assert len(llm.generate([[1, 2], [3, 4]], GREEDY, use_tqdm=False)) == 2


def test_an_engine_leaves_everybodys_random_numbers_alone(tiny: Path) -> None:
    """vLLM 11953: making an engine seeded the process, so that eight hosts drew the same."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with LLM(str(tiny), **SMALL, seed=7) as engine:
        engine.generate([[1, 2]], SamplingParams(max_tokens=4), use_tqdm=False)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())


def test_ids_that_have_no_text_decode_to_nothing(tmp_path: Path) -> None:
    """vLLM 48567, 13175, 32228: a vocabulary is padded beyond its tokenizer; such ids are sampled,
    reported and given back.
    """
    folder = ensure_checkpoint("tiny", cache_dir=tmp_path, vocab_size=4096, num_hidden_layers=1)
    with LLM(str(folder), **SMALL) as engine:
        prompt = [4000, 3000, 2048]
        params = SamplingParams(
            temperature=2.0, max_tokens=40, ignore_eos=True, logprobs=20, seed=1
        )
        (output,) = engine.generate([prompt], params, use_tqdm=False)
        completion = output.outputs[0]
        assert any(token >= 2048 for token in completion.token_ids)
        assert isinstance(completion.text, str)
        assert completion.logprobs is not None
        assert all(
            isinstance(entry.decoded_token, str)
            for step in completion.logprobs
            for entry in step.values()
        )


def test_tokens_that_agree_in_their_low_byte_are_other_prefixes(tiny: Path) -> None:
    """vllm-mlx 444: a hash over the low bytes of tokens found the wrong prefix."""
    one = [i % 200 + 1 for i in range(40)]
    other = [token + 256 for token in one]
    with LLM(str(tiny), **SMALL) as engine:
        engine.generate([one], GREEDY, use_tqdm=False)
        cached = engine.generate([other], GREEDY, use_tqdm=False)[0]
    with LLM(str(tiny), **SMALL, optimizations=BASELINE) as engine:
        assert (
            engine.generate([other], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
            == cached.outputs[0].token_ids
        )
    assert cached.num_cached_tokens == 0


@pytest.mark.parametrize("extra", [b"\0", b"trailing bytes" * 100])
def test_bytes_behind_the_last_tensor_are_a_message(
    tiny: Path, tmp_path: Path, extra: bytes
) -> None:
    """ComfyUI 15602: some loaders take such a file, some do not."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    with (model / "model.safetensors").open("ab") as file:
        file.write(extra)
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read .*truncated or damaged"
    ):
        LLM(str(model), **SMALL)


def test_the_recommended_sampling_keeps_the_end_of_sequence(tiny: Path, tmp_path: Path) -> None:
    """vLLM 45591: overriding one recommendation dropped eos_token_id, and answers never ended."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    with LLM(str(tiny), **SMALL) as engine:
        first = engine.generate([[1, 2]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids[0]
    (model / "generation_config.json").write_text(f'{{"eos_token_id": [7, {first}], "top_k": 1}}')
    with LLM(str(model), **SMALL) as engine:
        for params in (None, SamplingParams(temperature=0)):
            completion = engine.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0]
            assert (completion.finish_reason, len(completion.token_ids)) == ("stop", 1)


def test_the_default_sampling_is_not_greedy() -> None:
    """tpu-inference 1386: a default top_k of 1 made every temperature greedy."""
    assert (SamplingParams().temperature, SamplingParams().top_k, SamplingParams().top_p) == (
        1.0,
        0,
        1.0,
    )


@pytest.mark.parametrize(
    "name", ["best_of", "guided_decoding", "allowed_token_ids", "logits_processors"]
)
def test_what_is_not_there_is_refused_and_not_dropped(name: str) -> None:
    """vLLM 17075 (top_k was dropped on the way), 16529 (logit_bias ended the engine)."""
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})


def test_answers_are_counted_and_not_what_was_asked_for() -> None:
    """vLLM 435 counted the requested lengths, Fast-dLLM 15 the prompts as well: an answer of
    another length is wrong work.
    """
    request = {"prompt_token_ids": [1] * 10, "max_tokens": 4, "ignore_eos": True}
    workload = {"waves": [[request]]}
    assert wrong_work(workload, [[1, 2, 3, 4]]) == []
    assert wrong_work(workload, [[1, 2, 3]]) == ["request 0 asked for 4 tokens but got 3"]
    assert wrong_work(workload, []) == ["1 requests, but 0 outputs"]


@pytest.mark.filterwarnings("ignore")
def test_a_database_that_another_process_holds_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow 6490 and 5917, hydraflow 245."""

    def locked(*_: Any) -> Any:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(tracking, "_client", locked)
    assert "OperationalError: database is locked" in (tracking.objection(tmp_path) or "")
