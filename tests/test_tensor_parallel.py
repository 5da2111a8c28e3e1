"""Ranks over gloo: the same tokens, several engines side by side, and a rank that dies or hangs is an error, never a hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine import workers

SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "block_size": 8,
    "kv_cache_memory_bytes": 1 << 20,
}
PROMPTS = [{"prompt_token_ids": [20 + i, 30, 40 + i]} for i in range(5)]
PARAMS = SamplingParams(temperature=0.8, max_tokens=10, ignore_eos=True, seed=3, logprobs=2)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "nanovllm.engine.workers" in " ".join(p.cmdline())]


def test_two_ranks_compute_the_same_and_two_engines_run_side_by_side(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as single:
        expected = tokens_of(single)
        blocks = single.resolved_config()["num_kv_blocks"]
        assert single.toggles()["tensor_parallel_size"]["engaged"] == 0
    toggles = {"tensor_parallel_size": 2, "batching": "chunked", "prefix_cache": True, "overlap": True}
    with LLM(str(tiny), **SMALL, optimizations=toggles) as one, LLM(str(tiny), **SMALL, optimizations=toggles) as other:
        assert len(children()) == 2
        assert tokens_of(one) == expected
        assert tokens_of(other) == expected
        assert one.toggles()["tensor_parallel_size"]["engaged"] > 0
        assert one.resolved_config()["num_kv_blocks"] == 2 * blocks  # the same bytes a rank hold twice the tokens
    assert children() == []


def test_a_killed_rank_ends_the_engine_with_an_error(tiny: Path) -> None:
    llm = LLM(str(tiny), **SMALL, tensor_parallel_size=2)
    os.kill(children()[0].pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(workers.WorkerError, match=r"rank 1 was killed \(SIGKILL\)"):
        tokens_of(llm)
    assert time.monotonic() - begin < 20
    assert children() == []
    with pytest.raises(RuntimeError, match="takes no requests"):
        tokens_of(llm)


def test_a_hung_rank_ends_the_engine_with_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COLLECTIVE_TIMEOUT_S", 2.0)
    llm = LLM(str(tiny), **SMALL, tensor_parallel_size=2)
    os.kill(children()[0].pid, signal.SIGSTOP)
    with pytest.raises(workers.WorkerError, match="did not answer within 2 s"):
        tokens_of(llm)
    assert children() == []


def test_a_rank_that_fails_at_start_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_TIMEOUT_S", 20.0)
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with pytest.raises(workers.WorkerError, match="rank 1 ended"):
        LLM(str(tiny), **SMALL, tensor_parallel_size=2)


def test_a_degree_that_does_not_divide_the_heads(tiny: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide the model's 4 query heads"):
        LLM(str(tiny), **SMALL, tensor_parallel_size=3)
    assert children() == []
