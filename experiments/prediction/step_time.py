"""The time of a step: what the GPU computes and moves, part by part, and what the host does for it.

The parts are rooflines with efficiencies (Williams, Waterman and Patterson, "Roofline", CACM 2009), in
units that carry over to other machines: bytes over bandwidth, FLOPs over the peak, operations that
the host issues, and fixed times of a kernel. B and P are bandwidth and peak of the card, m the tokens
of a forward pass, L the layers, and everything is of one rank.

    matmuls      for the layers and for the head: bytes of weights / (B weights_bandwidth) and
                 2 weights (m + tile_tokens) / (P matmul_peak), combined as (x^4 + y^4)^(1/4):
                 the larger one, with a smooth bend where they are alike
    attention    of decodes: bytes of the KV read / (B kv_bandwidth), of those that another request has just
                 read / (B kv_bandwidth cached_speed), or for PyTorch's attention bytes gathered /
                 (B gather_bandwidth); of prefills: 4 q_heads head_dim pairs / (P prefill_peak)
    elementwise  bytes of activations (6 hidden + 3 intermediate a token) x passes / B
    sampling     bytes of float32 logits x passes / B
    kernels      a fixed time for each layer and pass, and for each group, prompt and chunk of PyTorch's attention
    all_reduce   2 L + 1 sums: a fixed time each, and 2 (n - 1) / n bytes / (link link_share)
    host         `host_op_s` of the card x operations

The formulas use only arithmetic, so that they take NumPy arrays of many steps as well (fitting.py).
Coefficients are in fitted.json, with the records that they were fitted on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.prediction.cards import Card
from experiments.prediction.step_work import StepWork
from experiments.records.types import ModelShape
from experiments.study.work_size import BYTES, kv_bytes_per_token, parameters
from nanovllm.config import Optimizations

FITTED = Path(__file__).parent / "fitted.json"
BEND = 4
"""The exponent that combines memory and arithmetic of a product."""
DEVICE_PARTS = ("matmuls", "attention", "elementwise", "sampling", "kernels", "all_reduce")
Number = Any
"""A float, or a NumPy array of one value a step."""


@dataclass(frozen=True)
class Coefficients:
    """Efficiencies are shares of the card's figures; `*_s` are seconds, `*_ops` operations of the host.
    All are greater than 0.
    """

    weights_bandwidth: float = 0.85
    matmul_peak: float = 0.7
    tile_tokens: float = 16.0
    kv_bandwidth: float = 0.8
    cached_speed: float = 2.0
    gather_bandwidth: float = 0.12
    prefill_peak: float = 0.3
    torch_prefill_peak: float = 0.15
    triton_passes: float = 1.0
    torch_passes: float = 4.0
    triton_sampling_passes: float = 2.0
    torch_sampling_passes: float = 8.0
    torch_noise_passes: float = 40.0
    triton_layer_s: float = 12e-6
    torch_layer_s: float = 60e-6
    group_s: float = 20e-6
    prompt_s: float = 10e-6
    chunk_s: float = 20e-6
    library_all_reduce_s: float = 12e-6
    symmetric_all_reduce_s: float = 7e-6
    link_share: float = 0.5
    triton_layer_ops: float = 60.0
    torch_layer_ops: float = 120.0
    group_ops: float = 15.0
    prompt_ops: float = 15.0
    chunk_ops: float = 10.0
    all_reduce_ops: float = 4.0
    step_ops: float = 80.0
    replay_ops: float = 25.0
    short_ops: float = 80.0
    plan_ops: float = 10.0
    row_ops: float = 0.3
    rank_ops: float = 20.0
    set_up_token_ops: float = 0.015


NAMES = tuple(field.name for field in dataclasses.fields(Coefficients))


@dataclass(frozen=True)
class Fitted:
    """What fitting.py found. spread: standard deviations of log(predicted / measured), "device" and "host",
    of times that the GPU and the host decide; t: how many of them a 90 % interval takes to each side.
    """

    coefficients: Coefficients
    spread: Mapping[str, float]
    t: float
    fitted_on: tuple[str, ...]


def read_fitted(path: Path = FITTED) -> Fitted:
    found = json.loads(path.read_text(encoding="utf-8"))
    return Fitted(
        Coefficients(**found["coefficients"]), found["spread"], found["t"], tuple(found["studies"])
    )


@dataclass(frozen=True)
class Rank:
    """A model on one rank of a configuration, in numbers that the formulas use."""

    layers: int
    layer_params: float
    head_params: float
    vocab_size: float
    hidden_size: int
    activation_width: float
    kv_bytes: float
    pair_flops: float
    bytes_per_value: int
    ranks: int
    triton_attention: bool
    triton_kernels: bool
    symmetric: bool

    @classmethod
    def of(cls, shape: ModelShape, dtype: str, optimizations: Optimizations) -> Rank:
        on: Any = optimizations
        ranks = on.tensor_parallel_size
        head = shape["vocab_size"] * shape["hidden_size"]
        heads = shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
        return cls(
            shape["num_hidden_layers"],
            (parameters(shape) - head) / ranks,
            head / ranks,
            shape["vocab_size"] / ranks,
            shape["hidden_size"],
            6 * shape["hidden_size"] + 3 * shape["intermediate_size"] / ranks,
            kv_bytes_per_token(shape, dtype) / ranks,
            4 * heads / ranks,
            BYTES[dtype],
            ranks,
            on.attention_backend != "torch",
            on.kernels != "torch",
            on.all_reduce == "symmetric_memory",
        )


def device_parts(
    work: StepWork | Any, card: Card, rank: Rank, c: Coefficients
) -> dict[str, Number]:
    """Seconds of each of DEVICE_PARTS."""
    bandwidth, peak, layers = card.bandwidth_bytes_per_s, card.peak_flops, rank.layers
    two = work.more_tokens > 0
    tokens = work.tokens + work.more_tokens

    def product(params: float, of_tokens: Number, passes: Number) -> Number:
        memory = passes * params * rank.bytes_per_value / (bandwidth * c.weights_bandwidth)
        flops = 2 * params * (of_tokens + c.tile_tokens * passes)
        return (memory**BEND + (flops / (peak * c.matmul_peak)) ** BEND) ** (1 / BEND)

    matmuls = (
        product(rank.layer_params, work.tokens, 1)
        + product(rank.layer_params, work.more_tokens, two * 1)
        + product(rank.head_params, work.sampled, 1 + two * 1)
    )
    if rank.triton_attention:
        read = work.kv_tokens + work.again / c.cached_speed
        decodes = read * rank.kv_bytes / (bandwidth * c.kv_bandwidth)
        attention = decodes + work.pairs * rank.pair_flops / (peak * c.prefill_peak)
    else:
        decodes = work.gathered * rank.kv_bytes / (bandwidth * c.gather_bandwidth)
        attention = decodes + work.pairs * rank.pair_flops / (peak * c.torch_prefill_peak)
    passes = c.triton_passes if rank.triton_kernels else c.torch_passes
    moved = tokens * layers * rank.activation_width * rank.bytes_per_value
    logits = 4 * rank.vocab_size / bandwidth
    if rank.triton_kernels:
        sampling = work.sampled * logits * c.triton_sampling_passes
    else:
        sampling = (
            work.sampled * c.torch_sampling_passes + work.noisy * c.torch_noise_passes
        ) * logits
    a_layer = c.triton_layer_s if rank.triton_kernels else c.torch_layer_s
    kernels = layers * a_layer * (1 + two * 1)
    if not rank.triton_attention:
        calls_s = work.groups * c.group_s + work.prefills * c.prompt_s + work.chunks * c.chunk_s
        kernels = kernels + layers * calls_s
    return {
        "matmuls": matmuls,
        "attention": attention,
        "elementwise": moved * passes / bandwidth,
        "sampling": sampling,
        "kernels": kernels,
        "all_reduce": _all_reduce_s(work, card, rank, c, tokens, two),
    }


def _all_reduce_s(
    work: Any, card: Card, rank: Rank, c: Coefficients, tokens: Number, two: Number
) -> Number:
    if rank.ranks == 1:
        return 0.0 * tokens
    each = c.symmetric_all_reduce_s if rank.symmetric else c.library_all_reduce_s
    sums = 2 * rank.layers + 1
    share = 2 * (rank.ranks - 1) / rank.ranks
    moved = tokens * rank.hidden_size * rank.bytes_per_value * share
    # a sum over n ranks takes log2(n) rounds; only two ranks were ever measured
    rounds = (rank.ranks - 1).bit_length()
    return sums * (each * rounds * (1 + two * 1) + moved / (card.link_bytes_per_s * c.link_share))


def host_parts(
    work: StepWork | Any, card: Card, rank: Rank, c: Coefficients
) -> tuple[Number, Number]:
    """Seconds to plan a step and commit it, and to issue it."""
    a_layer = c.triton_layer_ops if rank.triton_kernels else c.torch_layer_ops
    eager = c.step_ops + rank.layers * a_layer
    if not rank.triton_attention:
        calls = work.groups * c.group_ops + work.prefills * c.prompt_ops
        calls = calls + work.chunks * c.chunk_ops
        eager = eager + rank.layers * calls
    if rank.ranks > 1:
        eager = eager + (2 * rank.layers + 1) * c.all_reduce_ops
    issue = work.eager * eager + work.replayed * c.replay_ops + work.short * c.short_ops
    plan = c.plan_ops + c.row_ops * work.rows + (c.rank_ops if rank.ranks > 1 else 0.0)
    return plan * card.host_op_s, issue * card.host_op_s
