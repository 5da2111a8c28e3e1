"""Triton kernels without a GPU: each equals its torch twin under Triton's interpreter, and each
compiles for real GPUs.

`python tests/kernels/test_triton_kernels.py 89 [all]` is the second half: it records launches that the
wrappers make (on meta tensors) and compiles them for that compute capability. A process of its own,
because the interpreter replaces the kernels.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = __name__ != "__main__" and not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton.language as tl  # noqa: E402

from nanovllm.kernels.batch import ForwardBatch  # noqa: E402
from nanovllm.kernels.torch import activation, decode_step, experts, kv_store, norm, rope, sampling  # noqa: E402
from nanovllm.kernels.torch.attention import TorchAttention  # noqa: E402
from nanovllm.kernels.triton import activation as triton_activation  # noqa: E402
from nanovllm.kernels.triton import decode_step as triton_decode_step  # noqa: E402
from nanovllm.kernels.triton import experts as triton_experts  # noqa: E402
from nanovllm.kernels.triton import fused  # noqa: E402
from nanovllm.kernels.triton import kv_store as triton_kv_store  # noqa: E402
from nanovllm.kernels.triton import norm as triton_norm  # noqa: E402
from nanovllm.kernels.triton import rope as triton_rope  # noqa: E402
from nanovllm.kernels.triton import sampling as triton_sampling  # noqa: E402
from nanovllm.kernels.triton import sampling_shards as triton_sampling_shards  # noqa: E402
from nanovllm.kernels.triton.attention.backend import TritonAttention, _prefill_tiles, tilings  # noqa: E402
from nanovllm.kernels.triton.linear import _splits as splits_of  # noqa: E402
from nanovllm.kernels.triton.linear import linear as triton_linear  # noqa: E402

if INTERPRETED:
    from tests.support.interpreter import make_faster

    make_faster()

pytestmark = pytest.mark.filterwarnings(  # of the interpreter, which computes with NumPy
    "ignore:Conversion of an array with ndim:DeprecationWarning",
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_MEMORY_LIMIT = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
"""Bytes that a program may have, by compute capability: CUDA C++ programming guide, "Technical specifications"."""
# The interpreter truncates where a GPU rounds to nearest, and cannot multiply matrices of bfloat16.
DTYPES = [torch.float32, torch.bfloat16]
DOT_DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(a: Tensor, b: Tensor) -> None:
    """Within rounding: relative to each value, and to the largest where a sum cancels."""
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[a.dtype]
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.float().abs().max()))


# -- against the torch twins -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 96), (5, 1024), (2, 3, 40)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight = (
        draw(*shape, dtype=dtype),
        draw(*shape, dtype=dtype, seed=1),
        draw(shape[-1], dtype=dtype, seed=2),
    )
    before = x.clone(), residual.clone()
    close(triton_norm.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6))
    for ours, twin in zip(
        triton_norm.add_rms_norm(x, residual, weight, 1e-6),
        norm.add_rms_norm(x, residual, weight, 1e-6),
        strict=True,
    ):
        close(ours, twin)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_norm_of_tiny_values_feels_epsilon() -> None:
    x, weight = draw(2, 64) * 1e-4, draw(64, seed=1)
    close(triton_norm.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 96, 1500])
def test_silu_and_mul(dtype: torch.dtype, n: int) -> None:
    gate_up = draw(3, 2 * n, dtype=dtype) * 4
    close(triton_activation.silu_and_mul(gate_up), activation.silu_and_mul(gate_up))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 13, 16, 17])
# the last is no shape of ours
@pytest.mark.parametrize(("n", "k"), [(32, 512), (16, 1536), (48, 2048), (16, 640)])
def test_linear(rows: int, n: int, k: int) -> None:
    x, weight = draw(rows, k, dtype=DOT_DTYPES[1]), draw(n, k, dtype=DOT_DTYPES[1], seed=1)
    ours, exact = triton_linear(x, weight), x.double() @ weight.double().T
    assert float((ours.double() - exact).norm() / exact.norm()) < (
        4e-3 if ours.dtype == torch.bfloat16 else 5e-4
    )


@pytest.mark.parametrize("rows", [17, 40, 64])
@pytest.mark.parametrize(
    ("n", "k", "splits"), [(64, 1024, 1), (32, 1280, 2), (96, 3072, 4), (4096, 128, 1)]
)
def test_linear_in_tiles(rows: int, n: int, k: int, splits: int) -> None:
    assert splits_of(n, k) == splits
    x, weight = draw(rows, k, dtype=DOT_DTYPES[1]), draw(n, k, dtype=DOT_DTYPES[1], seed=1)
    exact = x.double() @ weight.double().T
    for _ in range(2):  # the counters are as they were
        ours = triton_linear(x, weight)
        assert float((ours.double() - exact).norm() / exact.norm()) < (
            4e-3 if ours.dtype == torch.bfloat16 else 5e-4
        )


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 40, 64])
@pytest.mark.parametrize(("n", "k", "splits"), [(64, 1024, 1), (32, 2048, 2)])
def test_linear_with_a_bias(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int, k: int, splits: int
) -> None:
    """Added before the sum is rounded."""
    module = sys.modules["nanovllm.kernels.triton.linear"]
    monkeypatch.setattr(module.F, "linear", None)  # not left to the library
    assert splits_of(n, k) == splits
    dtype = DOT_DTYPES[1]
    x, weight = draw(rows, k, dtype=dtype), draw(n, k, dtype=dtype, seed=1)
    bias = draw(n, dtype=dtype, seed=2) * 30
    exact = x.double() @ weight.double().T + bias.double()
    for _ in range(2):
        ours = triton_linear(x, weight, bias)
        assert float((ours.double() - exact).norm() / exact.norm()) < (
            4e-3 if ours.dtype == torch.bfloat16 else 5e-4
        )


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few_tokens", [3, 1024])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page"),
    [
        (2, 2, 64, 16),
        (1, 5, 32, 32),
        (3, 1, 16, 16),
        (2, 2, 80, 16),
        (1, 2, 96, 16),
        (1, 2, 128, 16),
        (1, 1, 256, 16),
    ],
)
def test_rope_and_stores(
    monkeypatch: pytest.MonkeyPatch,
    norms: bool,
    dtype: torch.dtype,
    few_tokens: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
) -> None:
    monkeypatch.setattr(triton_rope, "_FEW_TOKENS", few_tokens)
    num_tokens, num_blocks = 6, 4
    qkv = draw(num_tokens, (group + 2) * kv_heads * head_dim, dtype=dtype)
    q_weight, k_weight = (
        draw(head_dim, dtype=dtype, seed=seed) if norms else None for seed in (1, 2)
    )
    angles = draw(num_tokens, head_dim // 2, seed=3)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    slots = torch.randperm(num_blocks * page, generator=torch.Generator().manual_seed(4))[
        :num_tokens
    ].to(DEVICE)
    caches = [
        torch.zeros(num_blocks, kv_heads, page, head_dim, dtype=dtype, device=DEVICE)
        for _ in range(6)
    ]
    twin = rope.qk_norm_rope_store_kv(
        qkv, q_weight, k_weight, 1e-6, cos_sin, caches[0], caches[1], slots
    )
    ours = triton_rope.qk_norm_rope_store_kv(
        qkv, q_weight, k_weight, 1e-6, cos_sin, caches[2], caches[3], slots
    )
    for a, b in zip((*ours, caches[2], caches[3]), (*twin, caches[0], caches[1]), strict=True):
        close(a, b)
    triton_kv_store.store_kv(twin[1], twin[2], caches[4], caches[5], slots)
    kv_store.store_kv(twin[1], twin[2], caches[0], caches[1], slots)
    assert torch.equal(caches[4], caches[0])
    assert torch.equal(caches[5], caches[1])


FUSED_ROWS = [1, 3, 16, 17, 40, 64, 100, 130, 256]


@pytest.fixture
def fuse_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would be slower."""
    monkeypatch.setattr(fused, "_GATE_UP_ROWS", (1, 256))
    monkeypatch.setattr(fused, "_QKV_ROWS", (1, 256))


@pytest.mark.usefixtures("fuse_always")
@pytest.mark.parametrize("rows", FUSED_ROWS)
@pytest.mark.parametrize(("n", "k"), [(64, 128), (192, 384)])
def test_gate_and_up_in_one_kernel(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int, k: int
) -> None:
    monkeypatch.setattr(fused, "silu_and_mul", None)  # no fallback
    x, weight = draw(rows, k, dtype=DOT_DTYPES[1]), draw(2 * n, k, dtype=DOT_DTYPES[1], seed=1) / 8
    close(fused.linear_silu_and_mul(x, weight), activation.linear_silu_and_mul(x, weight))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), [(8, 512), (24, 2048), (16, 1536)])
def test_gate_and_up_of_few_rows(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int, k: int
) -> None:
    monkeypatch.setattr(fused, "silu_and_mul", None)
    monkeypatch.setattr(fused, "fused_gate_up", None)
    x, weight = draw(rows, k, dtype=DOT_DTYPES[1]), draw(2 * n, k, dtype=DOT_DTYPES[1], seed=1) / 16
    close(fused.linear_silu_and_mul(x, weight), activation.linear_silu_and_mul(x, weight))


def head_case(
    rows: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
    k: int,
    dtype: torch.dtype,
    *,
    with_bias: bool = False,
    with_norms: bool = True,
) -> tuple[Any, ...]:
    """What a layer's linear_qk_norm_rope_store_kv is given; the caches hold sevens."""
    x, weight = (
        draw(rows, k, dtype=dtype),
        draw((group + 2) * kv_heads * head_dim, k, dtype=dtype, seed=1) / 8,
    )
    angles = draw(rows, head_dim // 2, seed=4)
    num_blocks = rows // page + 2
    caches = (
        torch.full((num_blocks, kv_heads, page, head_dim), 7.0, dtype=dtype, device=DEVICE)
        for _ in range(2)
    )
    slots = torch.randperm(num_blocks * page, generator=torch.Generator().manual_seed(5))[:rows].to(
        DEVICE
    )
    norms = (draw(head_dim, dtype=dtype, seed=seed) if with_norms else None for seed in (2, 3))
    return (
        x,
        weight,
        draw(len(weight), dtype=dtype, seed=9) if with_bias else None,
        *norms,
        1e-6,
        torch.cat((angles.cos(), angles.sin()), dim=1),
        *caches,
        slots,
    )


def with_own_caches(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return *arguments[:7], arguments[7].clone(), arguments[8].clone(), arguments[9]


# (with a bias, with norms), as in: Qwen3; Llama and Mistral; Qwen2; Qwen3 with attention_bias
VARIANTS = [(False, True), (False, False), (True, False), (True, True)]


@pytest.mark.usefixtures("fuse_always")
@pytest.mark.parametrize("rows", FUSED_ROWS)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page", "k"),
    [(2, 2, 64, 16, 128), (1, 5, 32, 32, 256), (3, 1, 16, 8, 384), (1, 2, 128, 256, 128)],
)
def test_heads_in_one_kernel(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
    k: int,
) -> None:
    check_heads(monkeypatch, head_case(rows, kv_heads, group, head_dim, page, k, DOT_DTYPES[1]))


@pytest.mark.usefixtures("fuse_always")
@pytest.mark.parametrize(("with_bias", "with_norms"), VARIANTS[1:])
@pytest.mark.parametrize(("rows", "head_dim"), [(17, 64), (130, 64), (3, 128), (5, 256)])
def test_heads_of_other_families_in_one_kernel(
    monkeypatch: pytest.MonkeyPatch, rows: int, head_dim: int, with_bias: bool, with_norms: bool
) -> None:
    check_heads(
        monkeypatch,
        head_case(
            rows,
            2,
            2,
            head_dim,
            16,
            128,
            DOT_DTYPES[1],
            with_bias=with_bias,
            with_norms=with_norms,
        ),
    )


def check_heads(monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...]) -> None:
    monkeypatch.setattr(fused, "qk_norm_rope_store_kv", None)  # no fallback
    page = arguments[7].shape[2]
    theirs = with_own_caches(arguments)
    ours, twin = (
        fused.linear_qk_norm_rope_store_kv(*arguments),
        rope.linear_qk_norm_rope_store_kv(*theirs),
    )
    for a, b in zip((*ours, *arguments[7:9]), (*twin, *theirs[7:9]), strict=True):
        close(a, b)
    untouched = torch.ones(arguments[7].shape[0] * page, dtype=torch.bool, device=DEVICE)
    untouched[arguments[9]] = False
    for cache in arguments[7:9]:
        assert (cache.transpose(1, 2).flatten(0, 1)[untouched] == 7).all(), (
            "a slot that no token has was written to"
        )


@pytest.mark.usefixtures("fuse_always")
@pytest.mark.parametrize("rows", [1, 5, 17, 65])
def test_rows_past_the_last_store_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Behind the rows stand others, of inputs and of outputs; the last slot's neighbours and slot 0
    are not theirs either.
    """
    spare, real_empty = 128, torch.empty

    def part_of_more(n: int, *rest: int, **kwargs: Any) -> Tensor:
        outputs.append(torch.full((n + spare, *rest), 5.0, **kwargs))
        return outputs[-1][:n]

    x, weight, *rest, slots = head_case(rows + spare, 2, 2, 32, 16, 128, DOT_DTYPES[1])
    slots[slots == 0] = 1
    # where few rows have kernels of their own
    wide = draw(rows + spare, 512, dtype=x.dtype), draw(32, 512, dtype=x.dtype)
    for product in (
        lambda: fused.linear_silu_and_mul(x[:rows], weight),
        lambda: fused.linear_silu_and_mul(wide[0][:rows], wide[1]),
        lambda: fused.linear_qk_norm_rope_store_kv(x[:rows], weight, *rest, slots[:rows]),
    ):
        outputs: list[Tensor] = []
        monkeypatch.setattr(torch, "empty", part_of_more)
        product()
        monkeypatch.setattr(torch, "empty", real_empty)
        assert outputs
        assert all((output[rows:] == 5).all() and (output[:rows] != 5).any() for output in outputs)
    for cache in rest[-2:]:
        by_slot = cache.transpose(1, 2).flatten(0, 1)
        assert (by_slot == 7).flatten(1).all(dim=1).sum() == len(by_slot) - len(
            slots[:rows].unique()
        )


@pytest.mark.usefixtures("fuse_always")
def test_what_the_fused_kernels_do_not_do_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fallbacks: list[int] = []
    for name, separate in (
        ("silu_and_mul", fused.silu_and_mul),
        ("qk_norm_rope_store_kv", fused.qk_norm_rope_store_kv),
    ):
        monkeypatch.setattr(fused, name, lambda *args, f=separate: fallbacks.append(1) or f(*args))

    def check(case: tuple[Any, ...], falls_back: bool) -> None:
        fallbacks.clear()
        theirs = with_own_caches(case)
        ours, twin = (
            fused.linear_qk_norm_rope_store_kv(*case),
            rope.linear_qk_norm_rope_store_kv(*theirs),
        )
        for a, b in zip((*ours, *case[7:9]), (*twin, *theirs[7:9]), strict=True):
            close(a, b)
        close(fused.linear_silu_and_mul(*case[:3]), activation.linear_silu_and_mul(*case[:3]))
        assert len(fallbacks) == 2 * falls_back

    def gate_and_up_have_a_bias() -> None:
        x, weight, bias, *_ = head_case(5, 2, 2, 32, 16, 128, dtype, with_bias=True)
        fallbacks.clear()
        close(
            fused.linear_silu_and_mul(x, weight, bias),
            activation.linear_silu_and_mul(x, weight, bias),
        )
        assert len(fallbacks) == 1

    dtype = DOT_DTYPES[1]
    check(head_case(5, 2, 2, 32, 16, 128, dtype), False)
    check(head_case(257, 2, 2, 32, 16, 128, dtype), True)  # a prefill
    check(head_case(5, 2, 2, 32, 16, 128, torch.float32), True)
    check(head_case(5, 2, 2, 32, 16, 96, dtype), True)  # no multiple of a step
    # neither a head dimension nor a number of columns for tiles
    check(head_case(5, 1, 1, 24, 16, 128, dtype), True)
    gate_and_up_have_a_bias()
    x, weight, *rest = head_case(5, 2, 2, 32, 16, 128, dtype)
    monkeypatch.setattr(fused, "_FUSED_WEIGHTS", weight.numel())
    check((x, weight, *rest), True)


def test_products_are_fused_where_that_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    for name in (
        "linear_of_few",
        "fused_gate_up",
        "silu_and_mul",
        "fused_qkv",
        "qk_norm_rope_store_kv",
    ):
        monkeypatch.setattr(fused, name, lambda *_, name=name, **__: chosen.append(name))
    monkeypatch.setattr(fused, "linear", lambda *_: None)
    for rows, gate_up, qkv in (
        (1, "linear_of_few", None),
        (16, "linear_of_few", None),
        (17, "silu_and_mul", None),
        (32, "silu_and_mul", None),
        (33, "fused_gate_up", None),
        (64, "fused_gate_up", None),
        (65, "fused_gate_up", "fused_qkv"),
        (256, "fused_gate_up", "fused_qkv"),
        (257, "silu_and_mul", None),
    ):
        chosen.clear()
        fused.linear_silu_and_mul(
            draw(rows, 1024, dtype=torch.bfloat16), draw(256, 1024, dtype=torch.bfloat16)
        )
        fused.linear_qk_norm_rope_store_kv(*head_case(rows, 1, 2, 64, 16, 1024, torch.bfloat16))
        assert chosen == [gate_up, qkv or "qk_norm_rope_store_kv"]


def expert_case(
    tokens: int, top_k: int, num_experts: int, hidden: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What mix_experts is given: tokens that choose different experts, and some that nobody chooses."""
    scores = draw(tokens, num_experts, seed=4)
    scores[:, 1] -= 100
    shares, chosen = scores.softmax(-1).topk(top_k)
    return (
        draw(tokens, hidden, dtype=dtype),
        shares.to(dtype),
        chosen,
        draw(num_experts, 2 * size, hidden, dtype=dtype, seed=5) / hidden**0.5,
        draw(num_experts, hidden, size, dtype=dtype, seed=6) / size**0.5,
    )


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "hidden", "size"),
    [
        (1, 2, 8, 64, 32),
        (5, 3, 8, 96, 48),  # neither is a multiple of a tile
        (40, 8, 16, 64, 96),
        (130, 2, 6, 128, 64),  # tiles of 64 rows, several an expert
    ],
)
def test_mixtures_of_experts(
    dtype: torch.dtype, tokens: int, top_k: int, num_experts: int, hidden: int, size: int
) -> None:
    case = expert_case(tokens, top_k, num_experts, hidden, size, dtype)
    ours = triton_experts.mix_experts(*case)
    close(ours, experts.mix_experts(*case))
    # as plain PyTorch is recorded in a CUDA graph
    close(experts.mix_every_expert(*case), experts.mix_experts(*case))
    # the same token in another batch
    x, shares, chosen, *weights = case
    alone = triton_experts.mix_experts(x[:1], shares[:1], chosen[:1], *weights)
    close(alone, ours[:1])


def test_experts_of_other_ranks_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight experts, this rank has the first three; memory that is not written holds no number."""
    x, shares, chosen, gate_up, down = expert_case(40, 3, 8, 64, 32, torch.float32)
    here = chosen.where(chosen < 3, 3)
    assert (here == 3).any()
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, torch.nan, **how))
    ours = triton_experts.mix_experts(x, shares, here, gate_up[:3], down[:3], some_elsewhere=True)
    close(ours, experts.mix_experts(x, shares, here, gate_up[:3], down[:3], some_elsewhere=True))
    close(ours, experts.mix_experts(x, shares * (chosen < 3), chosen, gate_up, down))
    # none of them
    nobody = torch.full_like(chosen, 3)
    none = triton_experts.mix_experts(x, shares, nobody, gate_up[:3], down[:3], some_elsewhere=True)
    assert not none.any()


def test_all_tokens_may_choose_the_same_experts() -> None:
    x, shares, chosen, *weights = expert_case(70, 2, 8, 64, 32, torch.float32)
    chosen = torch.tensor([5, 7], device=DEVICE).expand(70, 2)
    close(
        triton_experts.mix_experts(x, shares, chosen, *weights),
        experts.mix_experts(x, shares, chosen, *weights),
    )


def test_large_products_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []
    module = sys.modules["nanovllm.kernels.triton.linear"]
    monkeypatch.setattr(
        module, "_linear_in_tiles", lambda x, weight, _: tiles.append(1) or x @ weight.T
    )
    monkeypatch.setattr(module, "_LARGE", 64 * 1024)
    for n, expected in ((32, 1), (64, 0)):
        tiles.clear()
        triton_linear(draw(20, 1024, dtype=torch.bfloat16), draw(n, 1024, dtype=torch.bfloat16))
        assert len(tiles) == expected


def test_noise_has_the_twins_bits() -> None:
    @triton.jit
    def noise_kernel(out_ptr, seed_ptr, position_ptr, TILE: tl.constexpr):  # noqa: N803
        row = tl.program_id(0)
        for first in range(0, 4 * TILE, TILE):
            uniform = triton_sampling.uniform_tile(
                tl.load(seed_ptr + row), tl.load(position_ptr + row), first, TILE
            )
            tl.store(
                out_ptr + row * 4 * TILE + first + tl.arange(0, TILE),
                triton_sampling.gumbel(uniform),
            )

    if not INTERPRETED:
        pytest.skip(
            "a kernel inside a function cannot be compiled; benchmarks/gpu_kernels.py compares sampled tokens on a GPU"
        )
    seeds = torch.tensor([0, 5, -1, 2**40 + 7, 2**62])
    positions = torch.tensor([0, 3, 1000, 2**31, 2**32 - 1])
    out = torch.zeros(5, 4096)
    noise_kernel[(5,)](out, seeds, positions, TILE=1024)
    assert torch.equal(
        out.view(torch.int32), sampling.gumbel_noise(seeds, positions, 4096).view(torch.int32)
    )


def test_extreme_words_give_the_twins_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip("needs the interpreter")
    words = (0, 1, 0xFFFFFFFF, 0xFFFFFF7F)
    monkeypatch.setattr(
        sampling, "philox4x32", lambda *_: tuple(torch.tensor([[word]]) for word in words)
    )
    expected = sampling.gumbel_noise(torch.tensor([0]), torch.tensor([0]), 4)[0]
    monkeypatch.setattr(triton_sampling, "_philox4x32", triton.jit(_extreme_philox))

    @triton.jit
    def noise_kernel(out_ptr):
        uniform = triton_sampling.uniform_tile(
            tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), 0, 4
        )
        tl.store(out_ptr + tl.arange(0, 4), triton_sampling.gumbel(uniform))

    out = torch.zeros(4)
    noise_kernel[(1,)](out)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def _extreme_philox(key0, key1, c0, c1):
    return c0 * 0, c0 * 0 + 1, c0 * 0 + 0xFFFFFFFF, c0 * 0 + 0xFFFFFF7F


@pytest.mark.parametrize(("page", "width"), [(16, 3), (32, 1500)])
def test_the_ends_of_a_decode_step(page: int, width: int) -> None:
    num_rows, n = 9, 5
    rows = torch.tensor([3, 0, 7, 8, 8], device=DEVICE)  # the last row of all pads
    positions = torch.tensor([0, 1, 2 * page + 5, 0, 0], device=DEVICE)
    tables = torch.arange(num_rows * width, dtype=torch.int32, device=DEVICE).view(num_rows, width)
    last_tokens, seeds = (
        torch.arange(num_rows, device=DEVICE) * 10,
        torch.arange(num_rows, device=DEVICE) * 2**40,
    )
    temperatures = draw(num_rows)
    state = (tables, last_tokens, temperatures, seeds, page)
    for ours, twin in zip(
        triton_decode_step.gather_decode_inputs(rows, positions, *state),
        decode_step.gather_decode_inputs(rows, positions, *state),
        strict=True,
    ):
        assert torch.equal(ours, twin)
    results = []
    for module in (triton_decode_step, decode_step):
        moved, tokens = positions.clone(), last_tokens.clone()
        module.advance_rows(rows, moved, tokens, torch.tensor([91, 92, 93, 94, 94], device=DEVICE))
        results.append((moved.tolist(), tokens.tolist()))
    assert results[0] == results[1]
    assert results[0][0] == [1, 2, 2 * page + 6, 0, 0]
    assert [results[0][1][row] for row in (3, 0, 7)] == [91, 92, 93][:n]


@pytest.mark.parametrize("count", [1, 200])
def test_blocks_are_written_where_they_belong(count: int) -> None:
    places = torch.randperm(30 * 40, generator=torch.Generator().manual_seed(0))[:count]
    updates = torch.stack((places // 40, places % 40, torch.arange(count) + 7), dim=1).to(DEVICE)
    tables = [torch.zeros(30, 40, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    triton_decode_step.write_blocks(tables[0], updates)
    decode_step.write_blocks(tables[1], updates)
    assert torch.equal(*tables)
    assert tables[0].count_nonzero() == count


@pytest.mark.parametrize(
    ("num_decodes", "lengths"), [(0, [1]), (3, [32, 33, 1, 64, 0, 5]), (2, [0, 0, 200])]
)
@pytest.mark.parametrize("spare", [0, 3])
def test_query_tiles_cover_every_prefill_once(
    num_decodes: int, lengths: list[int], spare: int
) -> None:
    starts = torch.tensor([1] * num_decodes + lengths).cumsum(0)
    batch = ForwardBatch(
        *[torch.empty(0)] * 3,
        torch.empty(0),
        torch.empty(1, dtype=torch.int32, device=DEVICE),
        torch.cat((torch.zeros(1, dtype=torch.int64), starts)).to(DEVICE),
        num_decodes,
        [1] * num_decodes + [length + 32 * spare * (i == 0) for i, length in enumerate(lengths)],
        [],
    )
    entries, tokens = _prefill_tiles(batch, 32).tolist()
    tiles = [
        (num_decodes + i, first)
        for i, length in enumerate(lengths)
        for first in range(0, length, 32)
    ]
    assert list(zip(entries, tokens, strict=True))[spare:] == tiles[::-1], (
        "the longest contexts first"
    )
    assert entries[:spare] == [-1] * spare


@pytest.mark.parametrize("vocab_size", [5, 2048, 5003])
@pytest.mark.parametrize("filtered", [False, True])
def test_samples_are_the_twins_tokens(vocab_size: int, filtered: bool) -> None:
    n = 6
    arguments = (
        draw(n, vocab_size, dtype=torch.bfloat16) * 3,
        torch.tensor([0.0, 0.6, 1.0, 1.7, 0.3, 0.0], device=DEVICE),
        torch.tensor([0, 5, 0, 2, 0, 1], device=DEVICE),
        torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0, 1.0], device=DEVICE),
        torch.tensor([5, -1, 2**40 + 7, 2**62, 0, 3], device=DEVICE),
        torch.tensor([0, 3, 100, 2**31, 7, 9], device=DEVICE),
    )
    flags = {"all_greedy": False, "any_top_k_top_p": filtered}
    assert torch.equal(
        triton_sampling.sample(*arguments, **flags), sampling.sample(*arguments, **flags)
    )


@pytest.mark.parametrize("vocab_size", [1023, 1024, 1025, 2049])  # a tile has 1,024 tokens
@pytest.mark.parametrize("programs", [1, 3, 8])  # how many there are decides about the slices
def test_samples_of_a_batch_are_those_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, programs: int
) -> None:
    monkeypatch.setattr(triton_sampling, "_PROGRAMS", programs)
    rows = 4
    arguments = (
        draw(rows, vocab_size) * 2,
        torch.tensor([0.7, 0.0, 1.3, 0.05], device=DEVICE),
        torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        torch.ones(rows, device=DEVICE),
        torch.arange(rows, device=DEVICE) * 2**33 + 7,
        torch.arange(rows, device=DEVICE) + programs,
    )
    flags = {"all_greedy": False, "any_top_k_top_p": False}
    together = triton_sampling.sample(*arguments, **flags)
    assert torch.equal(together, sampling.sample(*arguments, **flags))
    for i in range(rows):
        own = (column[i : i + 1] for column in arguments)
        assert torch.equal(triton_sampling.sample(*own, **flags)[0], together[i])


def test_ties_take_the_lowest_id_in_any_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[0, [4000, 8999]] = 1.0
    zeros, ones = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    integers = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for programs in (1, 4, 1024):
        monkeypatch.setattr(triton_sampling, "_PROGRAMS", programs)
        tokens = triton_sampling.sample(
            logits,
            zeros,
            integers,
            ones,
            integers,
            integers,
            all_greedy=True,
            any_top_k_top_p=False,
        )
        assert tokens.tolist() == [4000, 0]


def attention_case(
    dtype: torch.dtype,
    query_lens: list[int],
    seq_lens: list[int],
    num_decodes: int,
    page: int,
    kv_heads: int,
    group: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, ForwardBatch]:
    """q, k, v, caches with pages in random order, and the batch. Slots past the end of a sequence
    hold large numbers.
    """
    entries, width = len(query_lens), -(-max(seq_lens) // page)
    order = torch.randperm(entries * width, generator=torch.Generator().manual_seed(5))
    tables = order.view(entries, width).int().to(DEVICE)
    k_cache, v_cache = (
        draw(entries * width, kv_heads, page, head_dim, dtype=dtype, seed=s) for s in (6, 7)
    )
    for entry, seq_len in enumerate(seq_lens):
        for token in range(seq_len, width * page):
            k_cache[tables[entry, token // page], :, token % page] = 100.0
            v_cache[tables[entry, token // page], :, token % page] = 1000.0
    places = [
        (tables[e, p // page].item(), p % page)
        for e in range(entries)
        for p in range(seq_lens[e] - query_lens[e], seq_lens[e])
    ]
    k, v = (
        torch.stack([cache[block, :, offset] for block, offset in places])
        for cache in (k_cache, v_cache)
    )
    q = draw(len(places), kv_heads * group, head_dim, dtype=dtype, seed=8) * 3
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], device=DEVICE)
    nothing = torch.empty(0, device=DEVICE)
    batch = ForwardBatch(
        nothing,
        nothing,
        nothing,
        tables,
        torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        starts,
        num_decodes,
        query_lens,
        seq_lens,
    )
    return q, k, v, k_cache, v_cache, batch


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "num_decodes", "page", "kv_heads", "group", "head_dim"),
    [
        ([1], [1], 1, 16, 1, 1, 16),
        ([1], [900], 1, 256, 2, 2, 32),  # one sequence cut into many pieces
        ([1, 1, 1], [5, 200, 64], 3, 16, 2, 2, 64),
        # pieces that hold several sequences
        ([1] * 9, [300, 1, 64, 65, 63, 128, 10, 20, 500], 9, 64, 2, 2, 32),
        ([7], [7], 0, 16, 2, 2, 32),
        ([70, 33], [70, 90], 0, 32, 1, 5, 16),  # a group that is no power of two; a cached prefix
        # decodes and prefills in one step
        ([1, 1, 7, 70, 3], [1, 130, 7, 90, 140], 2, 16, 2, 3, 32),
        ([1, 1], [33, 17], 1, 16, 2, 4, 16),  # a prefill of one token
        ([1, 1, 7], [1, 130, 70], 2, 16, 2, 2, 80),  # heads that are no power of two
        ([1, 9, 1], [300, 40, 5], 1, 256, 1, 3, 96),
        ([1, 5], [40, 36], 1, 16, 1, 2, 24),
        ([1, 1, 7], [1, 130, 70], 2, 16, 1, 2, 256),
        ([1, 40], [90, 60], 1, 64, 2, 2, 128),
    ],
)
def test_attention(
    dtype: torch.dtype,
    query_lens: list[int],
    seq_lens: list[int],
    num_decodes: int,
    page: int,
    kv_heads: int,
    group: int,
    head_dim: int,
) -> None:
    *tensors, batch = attention_case(
        dtype, query_lens, seq_lens, num_decodes, page, kv_heads, group, head_dim
    )
    outputs = []
    for backend in (TorchAttention, TritonAttention):
        attention = backend(kv_heads, page, head_dim, dtype)
        attention.prepare(batch)
        # twice: the next layer finds clean counters
        outputs += [attention.attend(*tensors, batch) for _ in range(2)]
    close(outputs[2], outputs[0])
    assert torch.equal(outputs[2], outputs[3])


def test_padding_entries_cost_nothing_and_harm_nobody() -> None:
    *tensors, batch = attention_case(torch.float32, [1] * 5, [40, 200, 1, 1, 1], 5, 16, 2, 2, 32)
    outputs = []
    for num_padding in (0, 2):
        batch.seq_lens[5 - num_padding :] = 0
        attention = TritonAttention(2, 16, 32, torch.float32)
        attention.prepare(batch)
        outputs.append(attention.attend(*tensors, batch)[:3])
    close(outputs[1], outputs[0])
    units = sum(-(-n // attention.decode.kv_tile) + 2 for n in (40, 200, 1)) * 2
    assert batch.attention.totals[1] == units


@pytest.mark.parametrize("head_dim", [8, 264, 512])
def test_heads_that_no_tile_holds_are_an_error(head_dim: int) -> None:
    with pytest.raises(
        ValueError,
        match=f"head_dim={head_dim} cannot be used with attention_backend='triton': allowed is 16 ",
    ):
        TritonAttention(2, 16, head_dim, torch.float32)


@pytest.mark.parametrize("shared_bytes", [99 << 10, 227 << 10])
def test_tiles_of_the_measured_shapes_are_those_that_were_fastest(shared_bytes: int) -> None:
    for head_dim in (64, 96, 128):
        decode, prefill = tilings(torch.bfloat16, head_dim, shared_bytes)
        assert (decode.kv_tile, decode.rows, prefill.kv_tile, prefill.rows) == (64, 16, 64, 64)
        decode, prefill = tilings(torch.float32, head_dim, shared_bytes)
        assert (decode.kv_tile, decode.rows, prefill.kv_tile, prefill.rows) == (32, 16, 32, 32)


# who shares how many pages with whom: entries' groups, and the pages of each entry that are its
# group's
SHARING = [
    ([0, 0, 0], [2, 2, 2], [40, 90, 33]),  # one group; one of them has a single token of its own
    # two groups in any order, a loner, a shorter common part
    ([0, 1, 0, 2, 1, 0], [3, 1, 2, 0, 1, 3], [70, 17, 33, 40, 200, 49]),
    ([0, 0, 1, 1], [1, 1, 4, 4], [17, 0, 65, 0]),  # padding
    ([0] * 5 + [1] * 2, [6] * 5 + [1] * 2, [97, 100, 128, 160, 400, 20, 30]),
]


def sharing_case(
    dtype: torch.dtype,
    groups: list[int],
    pages: list[int],
    seq_lens: list[int],
    page: int,
    kv_heads: int,
    group: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, ForwardBatch]:
    """As attention_case, decodes only; the first pages of an entry are those of the first entry of
    its group.
    """
    scale = page // 16  # lengths are given for pages of 16
    q, _, _, k_cache, v_cache, batch = attention_case(
        dtype,
        [1] * len(groups),
        [max(1, n * scale) for n in seq_lens],
        len(groups),
        page,
        kv_heads,
        group,
        head_dim,
    )
    for entry, shared in enumerate(pages):
        batch.block_tables[entry, :shared] = batch.block_tables[
            groups.index(groups[entry]), :shared
        ]
    batch.seq_lens[:] = torch.tensor([n * scale for n in seq_lens])
    return q, q, q, k_cache, v_cache, batch  # decodes read k and v from the caches


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("groups", "pages", "seq_lens"), SHARING)
@pytest.mark.parametrize(
    ("page", "kv_heads", "group", "head_dim"),
    [(16, 2, 2, 16), (64, 1, 5, 16), (16, 1, 1, 32), (16, 1, 2, 80)],
)
def test_shared_prefixes_are_read_once(
    dtype: torch.dtype,
    groups: list[int],
    pages: list[int],
    seq_lens: list[int],
    page: int,
    kv_heads: int,
    group: int,
    head_dim: int,
) -> None:
    *tensors, batch = sharing_case(dtype, groups, pages, seq_lens, page, kv_heads, group, head_dim)
    alive = batch.seq_lens > 0
    expected = TritonAttention(kv_heads, page, head_dim, dtype)
    expected.prepare(batch)
    plain = expected.attend(*tensors, batch)[alive]
    counts: Counter[str] = Counter()
    cascade = TritonAttention(kv_heads, page, head_dim, dtype, cascade=counts)
    cascade.prepare(batch, share=True)
    ours = [cascade.attend(*tensors, batch)[alive] for _ in range(2)]
    close(ours[0], plain)
    assert torch.equal(ours[0], ours[1])
    assert counts == {"shared": 2}
    common = {
        g: min(
            n for n, of, length in zip(pages, groups, seq_lens, strict=True) if of == g and length
        )
        for g in set(groups)
    }
    expected_shared = [
        common[g]
        * page
        * (length > 0 and sum(x == g and n > 0 for x, n in zip(groups, seq_lens, strict=True)) > 1)
        for g, length in zip(groups, seq_lens, strict=True)
    ]
    shared = batch.attention.shared
    assert shared.tokens.tolist() == expected_shared
    assert sorted(shared.order.tolist()) == list(range(len(groups)))
    units = sum(
        -(-int(n - s) // cascade.decode.kv_tile) + 2
        for n, s in zip(batch.seq_lens, expected_shared, strict=True)
        if n
    )
    assert batch.attention.totals[1] == units * kv_heads, "the decode kernel has only what is left"


@pytest.mark.parametrize("programs", [1, 300])
def test_squads_of_a_large_group(programs: int) -> None:
    """More members than a squad takes, and than the rows of one program hold; and more squads than
    run at once, or more programs than there are units of work.
    """
    groups = [0, 1, 2] * 23
    pages = [(2, 1, 3)[g] for g in groups]
    *tensors, batch = sharing_case(
        torch.float32, groups, pages, [50 + i % 13 for i in range(69)], 16, 1, 3, 16
    )
    outputs = []
    for share in (False, True):
        attention = TritonAttention(1, 16, 16, torch.float32)
        # five members a program
        attention.squad, attention.prefill = 8, attention.prefill._replace(rows=16)
        attention.num_programs = programs
        attention.prepare(batch, share)
        outputs.append(attention.attend(*tensors, batch))
        units = sum(-(-int(n) // attention.decode.kv_tile) + 2 for n in batch.seq_lens)
        assert programs == 1 or units < programs
    close(outputs[1], outputs[0])
    sizes = batch.attention.shared.squad_sizes.tolist()
    assert sorted(size for size in sizes if size) == [7, 7, 7, 8, 8, 8, 8, 8, 8]
    assert sizes[9:] == [0] * (len(sizes) - 9)


# -- compiled for GPUs that are not here -----------------------------------------------------------


COMPILED_IN_EVERY_RUN = (89, 90)
"""The capability with the least shared memory, and that of most studies, whose kernels cover the one
before it. CI compiles for the others as well.
"""


@pytest.mark.timeout(
    1800
)  # 40 s of one idle core where Triton's cache is empty, 5 s where it is not
@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(c, marks=[] if c in COMPILED_IN_EVERY_RUN else pytest.mark.slow)
        for c in SHARED_MEMORY_LIMIT
    ],
)
def test_every_kernel_compiles_and_fits(capability: int) -> None:
    """At the shapes that need most of a GPU."""
    check_built(compile_in_process(capability), capability)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", SHARED_MEMORY_LIMIT)
def test_every_launch_compiles_and_fits(capability: int) -> None:
    check_built(compile_in_process(capability, "all"), capability)


def compile_in_process(capability: int, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["CUDA_VISIBLE_DEVICES"] = ""  # a GPU of this machine has limits of its own
    return subprocess.run(
        [sys.executable, str(Path(__file__)), str(capability), *more],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def check_built(done: subprocess.CompletedProcess[str], capability: int) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert set(kernels) == all_kernels(), "a kernel that no launch reaches, or one that is gone"
    print({name: of["shared"] for name, of in kernels.items()})
    too_large = {
        name: of["shared"]
        for name, of in kernels.items()
        if of["shared"] > SHARED_MEMORY_LIMIT[capability]
    }
    assert not too_large, (
        f"shared memory past the {SHARED_MEMORY_LIMIT[capability]} bytes of sm_{capability}"
    )
    for name, of in kernels.items():
        assert of["dependent"] == of["launches"] * (capability >= 90), (
            f"{name}: griddepcontrol is of sm_90 and later"
        )


def all_kernels() -> set[str]:
    """What kernels/triton/ launches, by its source."""
    folder = Path(triton_norm.__file__).parent
    return {
        name
        for file in folder.rglob("*.py")
        for name in re.findall(r"^def (\w*kernel)\(", file.read_text(), re.MULTILINE)
    }


def every_launch(dtype: torch.dtype, everything: bool) -> None:
    """Calls every wrapper on meta tensors: at the shapes that need most of a GPU, or at all those
    of Qwen3-0.6B and 8B, with other heads as well.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def geometry(head_dim: int, page: int) -> tuple[Tensor, Tensor]:
        return empty(4, kv_heads, page, head_dim), empty(head_dim)

    tokens, hidden, kv_heads, vocab, long = 8, 1024, 8, 151_936, torch.int64
    short = dtype == torch.bfloat16
    floats, ints = empty(tokens, dtype=torch.float32), empty(tokens, dtype=long)
    if everything:
        shapes = list(itertools.product((64, 80, 96, 128, 256), (256, 64, 16), (False, True)))
    else:
        shapes = [(128, 256, True), (256, 16, False)] if short else [(128, 16, False)]
    for head_dim, page, share in shapes:
        attention = TritonAttention(kv_heads, page, head_dim, dtype)
        batch = ForwardBatch(
            ints,
            ints,
            ints,
            empty(tokens, 4, dtype=torch.int32),
            empty(tokens, dtype=torch.int32),
            ints,
            4,
            [1] * 4 + [70] * 4,
            [1] * 4 + [70] * 4,
        )
        attention.prepare(batch, share)
        q, kv = empty(284, 16, head_dim), empty(284, kv_heads, head_dim)
        cache = empty(4, kv_heads, page, head_dim)
        attention.attend(q, kv, kv, cache, cache, batch)
    if not (short or everything):
        return
    triton_norm.rms_norm(empty(tokens, hidden), empty(hidden), 1e-6)
    triton_norm.add_rms_norm(
        empty(tokens, 4 * hidden), empty(tokens, 4 * hidden), empty(4 * hidden), 1e-6
    )
    triton_activation.silu_and_mul(empty(tokens, 6144))
    for rows, k in (
        ((1, 1024), (4, 3072), (8, 2048), (16, 3072), (1, 4096), (16, 4096))
        if everything
        else ((1, 4096), (16, 3072))
    ):
        triton_linear(empty(rows, k), empty(4096, k))
        triton_linear(empty(rows, k), empty(4096, k), empty(4096))
        if short and everything:
            fused.linear_silu_and_mul(empty(rows, k), empty(6144, k))
    for n, k in (
        ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))
        if everything
        else ((4096, 1024), (1024, 3072))
    ):
        triton_linear(empty(40, k), empty(n, k))
        triton_linear(empty(40, k), empty(n, k), empty(n))
    for head_dim, page in (
        itertools.product((64, 80, 96, 128, 256), (16, 256)) if everything else ((80, 256),)
    ):
        cache, norm_weight = geometry(head_dim, page)
        kv = empty(tokens, kv_heads, head_dim)
        triton_kv_store.store_kv(kv, kv, cache, cache, empty(tokens, dtype=long))
        for norms in ((norm_weight, norm_weight), (None, None)):
            triton_rope.qk_norm_rope_store_kv(
                empty(tokens, 32 * head_dim),
                *norms,
                1e-6,
                empty(tokens, head_dim, dtype=torch.float32),
                cache,
                cache,
                empty(tokens, dtype=long),
            )
    models = ((1024, 3072, 32), (4096, 12_288, 48)) if everything else ((1024, 3072, 32),)
    for rows, (k, intermediate, heads) in itertools.product(
        (32, 64, 128, 256) if everything else (64, 256), models
    ):
        if not short:
            continue
        fused.fused_gate_up(
            empty(rows, k),
            empty(2 * intermediate, k),
            fused.tiling_for(fused.GATE_UP_TILINGS, rows),
        )
        for head_dim, page in (
            itertools.product((64, 128, 256), (16, 256)) if everything else ((128, 256),)
        ):
            if rows < 128:  # those are not fused
                continue
            cache, norm_weight = geometry(head_dim, page)
            for with_bias, with_norms in VARIANTS:
                fused.fused_qkv(
                    empty(rows, k),
                    empty(heads * head_dim, k),
                    empty(heads * head_dim) if with_bias else None,
                    *([norm_weight if with_norms else None] * 2),
                    1e-6,
                    empty(rows, head_dim, dtype=torch.float32),
                    cache,
                    cache,
                    empty(rows, dtype=long),
                    fused.tiling_for(fused.QKV_TILINGS, rows),
                )
    for pairs in (8, 512) if everything else (8,):
        shares = empty(pairs, 8)
        triton_experts.mix_experts(
            empty(pairs, 2048),
            shares,
            torch.empty(shares.shape, dtype=long, device="meta"),
            empty(32, 2 * 768, 2048),
            empty(32, 2048, 768),
        )
    triton_sampling.sample(
        empty(tokens, vocab),
        floats,
        ints,
        floats,
        ints,
        ints,
        all_greedy=False,
        any_top_k_top_p=False,
    )
    for shard_size in (vocab // 2, vocab // 8) if everything else (vocab // 2,):
        best = triton_sampling_shards.best_of_shard(
            empty(tokens, shard_size), floats, ints, ints, shard_size, all_greedy=False
        )
        triton_sampling_shards.best_of_shards(
            empty(vocab // shard_size, *best.shape, dtype=torch.int32)
        )
    rows = empty(tokens, dtype=long)
    triton_decode_step.gather_decode_inputs(
        rows,
        rows,
        empty(257, 160, dtype=torch.int32),
        empty(257, dtype=long),
        empty(257, dtype=torch.float32),
        empty(257, dtype=long),
        page,
    )
    triton_decode_step.advance_rows(rows, rows, empty(257, dtype=long), rows)
    triton_decode_step.write_blocks(
        empty(257, 160, dtype=torch.int32), empty(tokens, 3, dtype=long)
    )


def compile_every_launch(capability: int, everything: bool) -> dict[str, dict[str, int]]:
    """For each kernel: `shared`, the most bytes of shared memory of its launches; `launches`, how
    many, and `dependent`, how many of them know of the kernel before them.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    types = {
        torch.bfloat16: "*bf16",
        torch.float32: "*fp32",
        torch.int64: "*i64",
        torch.int32: "*i32",
        int: "i32",
        float: "fp32",
    }
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = record  # type: ignore[method-assign]
    for name in ("linear", "fused", "attention"):
        module: Any = sys.modules[f"nanovllm.kernels.triton.{name}"]
        module.shared_memory = lambda device: SHARED_MEMORY_LIMIT[capability]
    for dtype in (torch.bfloat16, torch.float32):
        every_launch(dtype, everything)
    built: dict[str, dict[str, int]] = {}
    done: set[str] = set()
    for kernel, args, kwargs in launches:
        if capability >= 90:
            kwargs |= {"PDL": True, "launch_pdl": True}
        values = dict(zip(kernel.arg_names, args, strict=False)) | {
            k: v for k, v in kwargs.items() if k in kernel.arg_names
        }
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        assert "enable_fp_fusion" in options, (
            f"{kernel.__name__} leaves it to Triton's default, which is another from 3.10 on"
        )
        constants = {
            p.name: values[p.name]
            for p in kernel.params
            if p.is_constexpr or values[p.name] is None  # no bias, no norms
        }
        signature = {
            name: "constexpr"
            if name in constants
            else types[v.dtype if isinstance(v, Tensor) else type(v)]
            for name, v in values.items()
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*")
        }
        source = ASTSource(
            kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned
        )
        if (key := f"{source.hash()} {sorted(options.items())}") in done:
            continue
        done.add(key)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        of = built.setdefault(kernel.__name__, {"shared": 0, "launches": 0, "dependent": 0})
        of["shared"] = max(of["shared"], compiled.metadata.shared)
        of["launches"] += 1
        of["dependent"] += "griddepcontrol" in compiled.asm["ptx"]
    return built


if __name__ == "__main__":
    print(json.dumps(compile_every_launch(int(sys.argv[1]), sys.argv[2:] == ["all"])))
