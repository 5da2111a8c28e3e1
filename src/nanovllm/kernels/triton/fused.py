"""Two matmuls fused with what follows them: gate and up with SwiGLU; q, k and v with bias and norm
(where the family has them), rotary embedding and KV store.

For the rows of a decode step. Each saves a kernel, and the writing and reading between the two.
Unlike cuBLAS's kernels these are part of the chain of dependent launches (launch.py), so they start
before the kernel in front has ended.

    program     one tile of ROWS rows, and COLUMNS outputs: pairs of columns that are combined at the end,
                (gate, up) or (i, i + head_dim / 2) of one head
    weights     the two rows of a pair are adjacent in the tile, so that each thread has both sums in registers
    grid        the row tiles of one group of columns run side by side: they read the same weights, from L2

Gate and up of up to 16 rows is not computed here: the kernels of linear.py, which load their
weights before they wait, can end in SwiGLU as well. There is no such kernel for heads, as a norm
needs a whole head, whose weights do not fit into a program.

Measured on an H200 with Qwen3-0.6B, in the engine: about 1.5 % of a canonical step, 2 % of a step
of 8 or 64 requests (ablations/LOG.md says how well that is known). Prefetching weights into L2
while the kernel in front still runs made most of it slower; `benchmarks/gpu_fused.py` compares
tilings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.activation import gated, silu_and_mul
from nanovllm.kernels.triton.launch import let_next_start, pdl, shared_memory, wait_for_inputs
from nanovllm.kernels.triton.linear import linear, linear_of_few, suits_few
from nanovllm.kernels.triton.rope import norm_and_rotate, qk_norm_rope_store_kv

_GATE_UP_ROWS, _QKV_ROWS = (33, 256), (65, 256)
"""Numbers of rows (from, to) for which a tiled matmul is fused with what follows it; gate and up of up to 16 rows always are."""
_FUSED_WEIGHTS = 1 << 23
"""Tiled matmuls are fused only below this many weights: larger ones fill the GPU, and a separate kernel costs little."""


class Tiling(NamedTuple):
    """The tile of a program. A device with too little shared memory for the stages gets fewer."""

    rows: int
    # gate and up: half of them are gate's; for q, k and v a program has one head, whatever the value
    columns: int
    step: int  # of the reduction dimension per iteration
    stages: int
    warps: int


GATE_UP_TILINGS = {
    64: Tiling(64, 64, 128, 4, 8),
    128: Tiling(64, 64, 128, 3, 4),
    256: Tiling(64, 128, 64, 4, 4),
}
QKV_TILINGS = {128: Tiling(64, 128, 128, 4, 4), 256: Tiling(64, 128, 128, 3, 4)}
"""Keyed by the largest number of rows: the fastest of six or more on an H200."""


@triton.jit
def _pairs_of_products(
    x_ptr,
    weight_rows,
    biases,
    rows,
    num_rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of x times the weights at weight_rows ([COLUMNS, 1] pointers), plus biases ([1, COLUMNS]
    float32, or None): the results of even and of odd rows, each [ROWS, COLUMNS / 2] and rounded to
    the model's type once.
    """
    wait_for_inputs(PDL)
    ks = tl.arange(0, STEP)[None, :]
    exists = (rows < num_rows)[:, None]
    x_rows = x_ptr + rows[:, None] * K
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in tl.range(0, K, STEP, num_stages=STAGES):
        x = tl.load(x_rows + at + ks, mask=exists, other=0.0)
        acc = tl.dot(x, tl.trans(tl.load(weight_rows + at + ks)), acc)
    if biases is not None:
        acc += biases
    return tl.split(tl.reshape(acc.to(x_ptr.dtype.element_ty), (ROWS, COLUMNS // 2, 2)))


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    n,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[rows, columns] for COLUMNS / 2 of n columns: silu(x times row c of the weights) * (x
    times row c + n).
    """
    let_next_start(PDL)
    pairs: tl.constexpr = COLUMNS // 2
    members = tl.arange(0, COLUMNS)[:, None]
    first = tl.program_id(1) * pairs
    weight_rows = weight_ptr + (first + members // 2 + members % 2 * n).to(tl.int64) * K
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate, up = _pairs_of_products(
        x_ptr, weight_rows, None, rows, num_rows, K, ROWS, COLUMNS, STEP, STAGES, PDL
    )
    places = rows[:, None] * n + (first + tl.arange(0, pairs))[None, :]
    tl.store(out_ptr + places, gated(gate, up), mask=(rows < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _qkv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_rows,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of ROWS tokens. Heads are ordered: q's, then k's, then v's."""
    let_next_start(PDL)
    half: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(1)
    members = tl.arange(0, HEAD_DIM)[:, None]
    weight_rows = (
        weight_ptr + (head * HEAD_DIM + members // 2 + members % 2 * half).to(tl.int64) * K
    )
    biases = None
    if bias_ptr is not None:
        outputs = tl.arange(0, HEAD_DIM)[None, :]
        places = head * HEAD_DIM + outputs // 2 + outputs % 2 * half
        biases = tl.load(bias_ptr + places).to(tl.float32)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, second = _pairs_of_products(
        x_ptr, weight_rows, biases, rows, num_rows, K, ROWS, HEAD_DIM, STEP, STAGES, PDL
    )

    exists = (rows < num_rows)[:, None]
    columns = tl.arange(0, half)[None, :]
    tokens = rows[:, None].to(tl.int64)
    if head < Q_HEADS + KV_HEADS:
        norm_ptr = q_weight_ptr
        if q_weight_ptr is not None:  # noqa: SIM102  decided when compiling, the next by each program
            if head >= Q_HEADS:
                norm_ptr = k_weight_ptr
        cos = tl.load(cos_sin_ptr + tokens * HEAD_DIM + columns, mask=exists, other=0.0)
        sin = tl.load(cos_sin_ptr + tokens * HEAD_DIM + half + columns, mask=exists, other=0.0)
        first, second = norm_and_rotate(
            first, second, norm_ptr, columns, columns < half, cos, sin, eps, HEAD_DIM
        )
    if head < Q_HEADS:
        q_out = q_ptr + (tokens * Q_HEADS + head) * HEAD_DIM + columns
        tl.store(q_out, first, mask=exists)
        tl.store(q_out + half, second, mask=exists)
    else:
        kv_head = (head - Q_HEADS) % KV_HEADS
        slots = tl.load(slot_ptr + rows, mask=rows < num_rows, other=0)[:, None]
        fresh = (tokens * KV_HEADS + kv_head) * HEAD_DIM + columns
        cached = ((slots // PAGE * KV_HEADS + kv_head) * PAGE + slots % PAGE) * HEAD_DIM + columns
        if head < Q_HEADS + KV_HEADS:
            _store_kv(k_ptr + fresh, k_cache_ptr + cached, first, second, exists, half)
        else:
            _store_kv(v_ptr + fresh, v_cache_ptr + cached, first, second, exists, half)


@triton.jit
def _store_kv(fresh, cached, first, second, exists, half: tl.constexpr):
    tl.store(fresh, first, mask=exists)
    tl.store(fresh + half, second, mask=exists)
    tl.store(cached, first, mask=exists)
    tl.store(cached + half, second, mask=exists)


def tiling_for(tilings: dict[int, Tiling], num_rows: int) -> Tiling:
    """The tiling of the smallest bucket that holds the rows."""
    return next(
        (tiling for most, tiling in tilings.items() if num_rows <= most), list(tilings.values())[-1]
    )


def may_fuse(x: Tensor, rows: tuple[int, int]) -> bool:
    """Whether a matmul may be fused at all."""
    return rows[0] <= x.shape[0] <= rows[1] and x.dtype.itemsize == 2


def fits_tiles(x: Tensor, weight: Tensor, tiling: Tiling) -> bool:
    """Whether a matmul's rows and k suit the kernels of this file; the caller checks n."""
    return x.shape[1] % tiling.step == 0 and weight.numel() < _FUSED_WEIGHTS


def linear_silu_and_mul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [rows, k], weight: [2 * n, k], gate first -> silu(gate) * up: [rows, n]."""
    if bias is None and x.dtype.itemsize == 2 and suits_few(x, weight):
        return linear_of_few(x, weight, gate_and_up=True)
    if bias is None and may_fuse(x, _GATE_UP_ROWS):
        tiling = tiling_for(GATE_UP_TILINGS, x.shape[0])
        if fits_tiles(x, weight, tiling) and weight.shape[0] % tiling.columns == 0:
            return fused_gate_up(x, weight, tiling)
    return silu_and_mul(linear(x, weight, bias))


def fused_gate_up(x: Tensor, weight: Tensor, tiling: Tiling) -> Tensor:
    """linear_silu_and_mul in one kernel. n is a multiple of half of the tiling's columns, k of its
    step; bfloat16 or float16.
    """
    x = x.contiguous()
    (num_rows, k), n = x.shape, weight.shape[0] // 2
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    rows, columns, step, _, warps = tiling
    _gate_up_kernel[(triton.cdiv(num_rows, rows), 2 * n // columns)](
        x,
        weight,
        out,
        num_rows,
        n,
        K=k,
        ROWS=rows,
        COLUMNS=columns,
        STEP=step,
        STAGES=_stages(tiling, columns, x.device),
        num_warps=warps,
        **pdl(x),
    )
    return out


def linear_qk_norm_rope_store_kv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [tokens, k], weight: [(q_heads + 2 * kv_heads) * head_dim, k], bias: a number for each row
    of weight; the other arguments and the result as in rope.py. v is a tensor of its own where the matmul is fused.
    """
    tiling, head_dim = tiling_for(QKV_TILINGS, x.shape[0]), k_cache.shape[3]
    rest = q_weight, k_weight, eps, cos_sin, k_cache, v_cache, slot_mapping
    if (
        may_fuse(x, _QKV_ROWS)
        and fits_tiles(x, weight, tiling)
        and head_dim in (16, 32, 64, 128, 256)
    ):
        return fused_qkv(x, weight, bias, *rest, tiling)
    return qk_norm_rope_store_kv(linear(x, weight, bias), *rest)


def fused_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_qk_norm_rope_store_kv in one kernel. k is a multiple of the tiling's step; bfloat16 or
    float16.
    """
    x = x.contiguous()
    (num_rows, k), (_, kv_heads, page, head_dim) = x.shape, k_cache.shape
    q_heads = weight.shape[0] // head_dim - 2 * kv_heads
    q, key, value = (
        torch.empty(num_rows, heads, head_dim, dtype=x.dtype, device=x.device)
        for heads in (q_heads, kv_heads, kv_heads)
    )
    rows, _, step, _, warps = tiling
    _qkv_kernel[(triton.cdiv(num_rows, rows), q_heads + 2 * kv_heads)](
        x,
        weight,
        bias,
        q_weight,
        k_weight,
        eps,
        cos_sin,
        k_cache,
        v_cache,
        slot_mapping,
        q,
        key,
        value,
        num_rows,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE=page,
        K=k,
        ROWS=rows,
        STEP=step,
        STAGES=_stages(tiling, head_dim, x.device),
        num_warps=warps,
        **pdl(x),
    )
    return q, key, value


def _stages(tiling: Tiling, columns: int, device: torch.device) -> int:
    """The tiling's stages, or as many as fit into this device's shared memory. Below 64 rows Triton
    uses the older tensor-core instructions on any device, and then one stage less is in shared
    memory.
    """
    stage_bytes = (tiling.rows + columns) * tiling.step * 2
    return min(tiling.stages, shared_memory(device) // stage_bytes + (tiling.rows < 64))
