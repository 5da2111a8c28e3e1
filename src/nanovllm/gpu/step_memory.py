"""GPU memory that a step needs beside weights and KV cache, measured before the cache is sized."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanovllm.config import ResolvedConfig
from nanovllm.engine.kv_cache import KVCacheSpec
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import StepPlan
from nanovllm.toggles.counters import reset

GRAPH_BYTES = 4 << 20
"""Driver memory of one captured decode step: a few hundred kernel nodes and their arguments."""


@contextmanager
def room_for(what: str, instead: str) -> Iterator[None]:
    """Turns running out of memory in this context into a MemoryError that says what does not fit
    and what to do instead.
    """
    try:
        yield
    # torch.OutOfMemoryError is one; CUDA graphs, cuBLAS and Triton raise others
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search(
            "out of memory|ALLOC_FAILED", str(error)
        ):
            raise
        raise MemoryError(
            f"{what} does not fit into the device's memory: {instead} ({str(error).split('. ')[0]})"
        ) from error


def bytes_for_steps(runner: ModelRunner, spec: KVCacheSpec) -> int:
    """Bytes that activations take at most, measured by running the largest step; with CUDA graphs,
    also those of the graphs, which stay allocated.

    Raises MemoryError, saying what to lower, where that step does not fit.
    """
    config = runner.config
    if (rehearsal := getattr(runner, "rehearsal", None)) is not None:
        rehearsal.wait()
    runner.kv_caches = spec.allocate(1, runner.device)
    step = f"a step of {config.max_num_batched_tokens} tokens and {config.max_num_seqs} requests, beside the weights,"
    try:
        with room_for(
            step, "lower max_num_batched_tokens or max_num_seqs, or free memory on the device"
        ):
            reserved = _peak_bytes(runner, prefill(config, config.max_num_batched_tokens))
            if config.optimizations.cuda_graphs:
                reserved += _peak_bytes(runner, prefill(config, config.max_num_seqs))
                reserved += GRAPH_BYTES * max(2 * len(runner.buckets), len(runner.variants))  # type: ignore[attr-defined]
    finally:
        runner.kv_caches = []
    reset(runner.stats)
    torch.cuda.empty_cache()
    return reserved


def prefill(config: ResolvedConfig, num_tokens: int) -> StepPlan:
    """A plan of `num_tokens` prefill tokens, or as many as are possible, spread over as many
    requests as may run; all of them sample.
    """
    num_tokens = min(num_tokens, config.max_num_seqs * config.max_model_len)
    entries = min(config.max_num_seqs, num_tokens)
    lengths = [num_tokens // entries + (i < num_tokens % entries) for i in range(entries)]
    return StepPlan(
        -1,
        rows=list(range(entries)),
        starts=[0] * entries,
        query_lens=lengths,
        samples=[True] * entries,
        token_ids=[0] * num_tokens,
        greedy_only=False,
    )


def _peak_bytes(runner: ModelRunner, plan: StepPlan) -> int:
    torch.cuda.synchronize(runner.device)
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_allocated(runner.device)
    runner.collect(runner.submit(plan))
    return torch.cuda.max_memory_allocated(runner.device) - before
