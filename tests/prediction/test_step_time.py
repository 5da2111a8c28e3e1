"""The model of a step: better hardware is never slower, and its constants are the engine's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.prediction import cards, step_work
from experiments.prediction.cards import Card
from experiments.prediction.cells import predict_cell
from experiments.prediction.shapes import SHAPES
from experiments.prediction.step_time import (
    DEVICE_PARTS,
    Coefficients,
    Fitted,
    Rank,
    device_parts,
    host_parts,
)
from experiments.prediction.step_work import StepWork
from nanovllm.config import Optimizations
from nanovllm.gpu import cuda_graph, prefill_graph
from nanovllm.kernels.torch import attention
from nanovllm.models import checkpoint
from tests.prediction.plans import plan_of, workload_of

CARD = Card("a card", 1e12, 1e14, 16 * 10**9, 1e-5, 1e11)
FACTS = ("bandwidth_bytes_per_s", "peak_flops", "memory_bytes", "link_bytes_per_s")
FITTED = Fitted(
    Coefficients(),
    {"device": 0.05, "host": 0.2, "ratio_device": 0.05, "ratio_host": 0.1},
    1.7,
    (),
)
LEVELS = st.fixed_dictionaries(
    {
        "attention_backend": st.sampled_from(["torch", "triton"]),
        "kernels": st.sampled_from(["torch", "triton"]),
        "batching": st.sampled_from(["static", "continuous", "chunked"]),
        "cuda_graphs": st.booleans(),
        "overlap": st.booleans(),
        "prefix_cache": st.booleans(),
        "tensor_parallel_size": st.sampled_from([1, 2]),
    }
)


def rate(card: Card, levels: dict[str, Any], kv_blocks: int = 200, seed: int = 0) -> float:
    plan = plan_of(levels, kv_blocks=kv_blocks)
    predicted = predict_cell("cell", plan, workload_of(plan, seed), card, FITTED, splits=True)
    return predicted.output_tokens_per_s


@settings(max_examples=25, deadline=None)
@given(LEVELS, st.sampled_from([*FACTS, "host_op_s"]), st.floats(1.01, 20), st.integers(0, 3))
def test_better_hardware_is_never_predicted_to_be_slower(
    levels: dict[str, Any], fact: str, times: float, seed: int
) -> None:
    factor = 1 / times if fact == "host_op_s" else times
    value = getattr(CARD, fact) * factor
    better = dataclasses.replace(CARD, **{fact: int(value) if fact == "memory_bytes" else value})
    assert rate(better, levels, seed=seed) >= rate(CARD, levels, seed=seed) * (1 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(LEVELS, st.sampled_from([40, 60, 90, 150]), st.integers(0, 3))
def test_a_larger_kv_cache_is_hardly_ever_slower(
    levels: dict[str, Any], blocks: int, seed: int
) -> None:
    """Never is more than can be said: with more room other requests share a step, which may end the last
    of them a few steps later.
    """
    assert rate(CARD, levels, 2 * blocks, seed) >= rate(CARD, levels, blocks, seed) * 0.93


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 256),
    st.integers(0, 2000),
    st.integers(0, 100_000),
    st.booleans(),
    st.sampled_from([1, 2, 4, 8]),
)
def test_more_work_never_takes_less_time(
    decodes: int, prefill: int, kv: int, triton: bool, ranks: int
) -> None:
    if decodes + prefill == 0:
        return
    level = "triton" if triton else "torch"
    rank = Rank.of(
        SHAPES["qwen3-0.6b"],
        "bfloat16",
        Optimizations(attention_backend=level, kernels=level, tensor_parallel_size=ranks),
    )
    work = StepWork(1, 0, 0, decodes, decodes + prefill, 0, decodes, 0, kv, 0, kv, 1, 0, 0, 0)
    more = dataclasses.replace(
        work,
        rows=work.rows + 1,
        tokens=work.tokens + 1,
        sampled=work.sampled + 1,
        kv_tokens=kv + 7,
        gathered=kv + 7,
        pairs=5,
    )
    c = Coefficients()
    parts, longer = (device_parts(w, CARD, rank, c) for w in (work, more))
    assert tuple(parts) == DEVICE_PARTS
    assert all(longer[name] >= parts[name] >= 0 for name in parts)
    assert sum(host_parts(more, CARD, rank, c)) >= sum(host_parts(work, CARD, rank, c)) > 0


def test_constants_are_those_of_the_engine() -> None:
    assert step_work.SHARING_KV_HEADS == cuda_graph.SHARING_KV_HEADS
    assert step_work.PREFILL_BUCKETS == prefill_graph.TOKENS
    assert step_work.PREFILL_ENTRIES == prefill_graph.ENTRIES
    assert step_work.GROUP == attention.GROUP
    for most in (1, 3, 16, 32, 100, 256):
        assert step_work.buckets_for(most) == cuda_graph.buckets_for(most)


def test_sizes_of_presets_are_those_of_their_checkpoints() -> None:
    recipes = checkpoint.PRESETS | checkpoint.GENERATED
    for name, shape in SHAPES.items():
        for key, value in shape.items():
            assert getattr(recipes[name], key) == value, (name, key)


@pytest.mark.parametrize("fact", [*FACTS, "host_op_s"])
def test_a_card_without_speed_is_refused(fact: str) -> None:
    with pytest.raises(ValueError, match=f"{fact} is 0; it must be greater than 0"):
        dataclasses.replace(CARD, **{fact: 0})


def test_a_cpu_has_no_card() -> None:
    profile: Any = {"name": "cpu", "device": "cpu"}
    with pytest.raises(ValueError, match="give the profile of a GPU"):
        cards.card_of(profile)
