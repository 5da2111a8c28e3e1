"""The real engine on the embedded checkpoint, and what HF transformers says of its tokens.

What a CPU has of the toggles is all here: batching, prefix cache, overlap; CUDA graphs replayed by
hand (the real buckets, padding and inputs, see tests/gpu/test_cuda_graph.py); tensor parallelism with
ranks in threads (ranks.py).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from experiments.gate.rescoring import Rescorer, Scores
from experiments.gate.rules import GateParams, GateResult, judge
from nanovllm.config import EngineConfig, Optimizations
from nanovllm.engine import llm_engine
from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.models.checkpoint import ensure_checkpoint
from nanovllm.sampling_params import SamplingParams
from property_tests.support.model_free import expect
from property_tests.support.ranks import in_place_of_processes
from property_tests.support.strategies import Request, Shape, Workload
from tests.gpu.test_cuda_graph import FakeGraphRunner

MAX_MODEL_LEN = 128
BYTES_A_TOKEN = 4 * 2 * 2 * 64 * 4  # of KV: layers, keys and values, heads, head_dim, float32
VOCAB = 2048


MODEL = os.environ.get("NANOVLLM_PROPERTY_MODEL", "tiny")
"""A preset of any family (`make property MODEL=tiny-llama`); all those named tiny have the same vocabulary and KV cache."""


@cache
def tiny() -> Path:
    return ensure_checkpoint(MODEL)


@contextmanager
def engine_of(shape: Shape, **changes: Any) -> Iterator[LLMEngine]:
    """A real engine of that shape, in float32."""
    switches = Optimizations(
        batching=shape.batching,
        prefix_cache=shape.prefix_cache,
        overlap=shape.lag == 1,
        tensor_parallel_size=shape.ranks,
    )
    config: dict[str, Any] = {
        "model": str(tiny()),
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": shape.max_num_seqs,
        "max_num_batched_tokens": shape.max_num_batched_tokens,
        "block_size": shape.block_size,
        "kv_cache_memory_bytes": shape.num_blocks * shape.block_size * BYTES_A_TOKEN // shape.ranks,
        "optimizations": switches,
    }
    with ExitStack() as stack:
        with ExitStack() as building:
            if shape.graphs:
                building.enter_context(patch.object(llm_engine, "ModelRunner", FakeGraphRunner))
                building.enter_context(patch("nanovllm.cpu.runner.CpuRunner", FakeGraphRunner))
            building.enter_context(in_place_of_processes())
            engine = stack.enter_context(LLMEngine(EngineConfig(**config | changes)))
        expect(engine.scheduler, shape)
        yield engine


@dataclass(frozen=True)
class Served:
    """What became of a request. finish_reason: "length", "stop" or "abort"."""

    request: Request
    tokens: list[int]
    finish_reason: str


def serve(engine: LLMEngine, requests: tuple[Request, ...], tag: str = "") -> list[Served]:
    """Runs all requests to their ends, checking the structure after each step, and what a user is
    promised at the end.

    Raises AssertionError where a request is lost, ends twice, ends for the wrong reason, or where
    nothing advances.
    """
    tokens: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    ended: dict[int, str] = {}
    bound = (
        100
        + max(r.arrival for r in requests)
        + 20 * sum(len(r.prompt) + r.params.max_tokens for r in requests)
    )
    for step in range(bound):
        for i, request in enumerate(requests):
            if request.arrival == step:
                engine.add_request(
                    f"{tag}{i}", {"prompt_token_ids": list(request.prompt)}, request.params
                )
            if (
                request.abort is not None
                and request.arrival + request.abort == step
                and engine.abort(f"{tag}{i}")
            ):
                assert i not in ended, (
                    f"request {i} ended by {ended.get(i)} and could still be aborted"
                )
                ended[i] = "abort"
        for output in engine.step():
            i = int(output.request_id.removeprefix(tag))
            assert i not in ended, f"request {i} ended ({ended.get(i)}) and got another token"
            tokens[i] = output.outputs[0].token_ids
            if output.finished:
                ended[i] = str(output.outputs[0].finish_reason)
        check_invariants(engine.scheduler)
        if len(ended) == len(requests) and not engine.has_unfinished_requests():
            break
    assert len(ended) == len(requests), (
        f"requests {sorted(set(tokens) - set(ended))} have not ended after {bound} steps"
    )
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks, (
        "blocks were lost"
    )
    served = [Served(request, tokens[i], ended[i]) for i, request in enumerate(requests)]
    for one in served:
        check_end(one, () if one.request.params.ignore_eos else engine.model_config.eos_token_ids)
    return served


def check_end(served: Served, eos_token_ids: Collection[int]) -> None:
    """A request stops at the first stop or end-of-sequence token, or at max_tokens, whichever comes
    first, and says which.
    """
    params, tokens = served.request.params, served.tokens
    stops = [
        i
        for i, token in enumerate(tokens)
        if token in params.stop_token_ids or token in eos_token_ids
    ]
    assert not stops or stops[0] >= getattr(params, "min_tokens", 0), (
        f"stop token at {stops[0]}, before min_tokens={getattr(params, 'min_tokens', 0)}"
    )
    if served.finish_reason == "stop":
        assert stops == [len(tokens) - 1], (
            f"stopped with {len(tokens)} tokens, of which {stops} are stop tokens"
        )
    elif served.finish_reason == "length":
        assert len(tokens) == params.max_tokens, (
            f"ended by length with {len(tokens)} tokens; max_tokens={params.max_tokens}"
        )
        assert not stops, f"did not stop at stop token {stops[0]}"
    else:
        assert served.finish_reason == "abort", f"ended by {served.finish_reason!r}"
        assert not stops, f"ran on after stop token {stops[0]}"


def run(workload: Workload) -> list[Served]:
    with engine_of(workload.shape) as engine:
        return serve(engine, workload.requests)


def options_of(params: Any) -> dict[str, Any]:
    """The options of a request as the gate takes them; {} where it has none."""
    if type(params) is SamplingParams:
        return {}
    names = ("min_p", "min_tokens", "repetition_penalty", "frequency_penalty", "presence_penalty")
    return {name: getattr(params, name) for name in names} | {
        "logit_bias": params.logit_bias or {},
        "stop_token_ids": list(params.stop_token_ids),
    }


class Reference:
    """HF in float64, and the noise of HF in float32 on the sample at hand and on a fixed one: a few
    tokens show too little.
    """

    def __init__(self) -> None:
        self.rescorer = Rescorer(tiny(), "float32")
        generator = torch.Generator().manual_seed(0)
        texts = torch.randint(VOCAB, (8, 100), generator=generator).tolist()
        greedy = {
            "max_tokens": 64,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "seed": 0,
            "ignore_eos": True,
        }
        noise = self.rescorer.score(
            [greedy | {"prompt_token_ids": text[:36]} for text in texts],
            [text[36:] for text in texts],
        )
        # Only their errors count: nobody chose these tokens.
        self.noise = [
            replace(s, agrees=torch.ones_like(s.agrees), margin=torch.zeros_like(s.margin))
            for s in noise
        ]

    def score(self, served: list[Served]) -> list[Scores]:
        requests = [
            {
                "prompt_token_ids": list(s.request.prompt),
                "max_tokens": s.request.params.max_tokens,
                "ignore_eos": True,
            }
            | {name: getattr(s.request.params, name) for name in ("temperature", "top_k", "top_p")}
            | {"seed": s.request.params.seed or 0}
            | options_of(s.request.params)
            for s in served
        ]
        return self.rescorer.score(requests, [s.tokens for s in served])

    def judge(self, scores: list[Scores]) -> GateResult:
        return judge([*scores, *self.noise], "float32", GateParams())

    def assert_right(self, served: list[Served]) -> None:
        """Every token is the reference's choice, or within the noise of float32."""
        with_tokens = [s for s in served if s.tokens]
        if with_tokens:
            result = self.judge(self.score(with_tokens))
            assert result.passed, f"{result.reason}; first: {result.first_offender}"

    def assert_same(self, one: Served, other: Served) -> None:
        """The same tokens; where they part, both choices are within the noise of float32 there."""
        parting = next(
            (i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b),
            None,
        )
        if parting is None:
            assert len(one.tokens) == len(other.tokens), (
                f"{len(one.tokens)} tokens and {len(other.tokens)}, otherwise the same"
            )
            return
        for served in (one, other):
            scores = self.score([replace(served, tokens=served.tokens[: parting + 1])])
            margin, bound = float(scores[0].margin[-1]), self.judge(scores).bound
            assert margin <= bound, (
                f"tokens part at {parting}: {one.tokens[parting]} and {other.tokens[parting]}; "
                f"{served.tokens[parting]} has a margin of {margin:.3g} logits, the noise bound is {bound:.3g}"
            )


@cache
def reference() -> Reference:
    return Reference()
