"""Everything between the QKV projection and attention, in one pass: q/k norm where the family has it,
rotary embedding (Su et al., 2021), KV store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.launch import pdl, wait_for_inputs

_FEW_TOKENS = 1024
"""Up to this many tokens a program handles one KV head of a token, so that all multiprocessors have
work; above, a whole token.
"""


@triton.jit
def norm_and_rotate(
    first, second, weight_ptr, columns, in_half, cos, sin, eps, HEAD_DIM: tl.constexpr
):
    """Rows of heads, as (first half, second half): [rows, head_dim / 2] each -> the same, with
    `columns` those of a half. weight_ptr: None where heads have no norms.

    Rounded to the model's type after the norm and after its weight, as the torch twin.
    """
    half: tl.constexpr = HEAD_DIM // 2
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / HEAD_DIM + eps)[:, None]
        a = (a * scale).to(dtype).to(tl.float32) * tl.load(weight_ptr + columns, mask=in_half).to(
            tl.float32
        )
        b = (b * scale).to(dtype).to(tl.float32) * tl.load(
            weight_ptr + half + columns, mask=in_half
        ).to(tl.float32)
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _load_norm_and_rotate(
    x_ptr, weight_ptr, rows, columns, inside, cos, sin, eps, HEAD_DIM: tl.constexpr
):
    """norm_and_rotate for the heads at x_ptr + rows ([heads, 1] offsets)."""
    half: tl.constexpr = HEAD_DIM // 2
    first = tl.load(x_ptr + rows + columns, mask=inside, other=0.0)
    second = tl.load(x_ptr + rows + half + columns, mask=inside, other=0.0)
    return norm_and_rotate(
        first, second, weight_ptr, columns, columns < half, cos, sin, eps, HEAD_DIM
    )


@triton.jit
def _qk_norm_rope_store_kv_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token and HEADS of its KV heads, with their GROUP query heads each."""
    half: tl.constexpr = HEAD_DIM // 2
    q_heads: tl.constexpr = KV_HEADS * GROUP
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    in_half = columns < half
    wait_for_inputs(PDL)
    cos = tl.load(cos_sin_ptr + token * HEAD_DIM + columns, mask=in_half)
    sin = tl.load(cos_sin_ptr + token * HEAD_DIM + half + columns, mask=in_half)
    heads = qkv_ptr + token * (q_heads + 2 * KV_HEADS) * HEAD_DIM

    members = tl.arange(0, Q_BLOCK)[:, None]
    inside = (members < HEADS * GROUP) & in_half
    q_rows = (first_head * GROUP + members) * HEAD_DIM
    first, second = _load_norm_and_rotate(
        heads, q_weight_ptr, q_rows, columns, inside, cos, sin, eps, HEAD_DIM
    )
    q_out = q_ptr + token * q_heads * HEAD_DIM + q_rows + columns
    tl.store(q_out, first, mask=inside)
    tl.store(q_out + half, second, mask=inside)

    members = tl.arange(0, KV_BLOCK)[:, None]
    inside = (members < HEADS) & in_half
    kv_heads = first_head + members
    k_rows = (q_heads + kv_heads) * HEAD_DIM
    first, second = _load_norm_and_rotate(
        heads, k_weight_ptr, k_rows, columns, inside, cos, sin, eps, HEAD_DIM
    )
    v_rows = heads + (q_heads + KV_HEADS + kv_heads) * HEAD_DIM + columns
    k_out = k_ptr + (token * KV_HEADS + kv_heads) * HEAD_DIM + columns
    slot = tl.load(slot_ptr + token)
    cached = ((slot // PAGE * KV_HEADS + kv_heads) * PAGE + slot % PAGE) * HEAD_DIM + columns
    tl.store(k_out, first, mask=inside)
    tl.store(k_out + half, second, mask=inside)
    tl.store(k_cache_ptr + cached, first, mask=inside)
    tl.store(k_cache_ptr + cached + half, second, mask=inside)
    tl.store(v_cache_ptr + cached, tl.load(v_rows, mask=inside), mask=inside)
    tl.store(v_cache_ptr + cached + half, tl.load(v_rows + half, mask=inside), mask=inside)


def qk_norm_rope_store_kv(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv: [tokens, (q_heads + 2 * kv_heads) * head_dim]; q_weight, k_weight: [head_dim], both None
    where heads have no norms; cos_sin: [tokens, head_dim] float32, cosines first; caches: [blocks, kv_heads, block_size, head_dim];
    slot_mapping: [tokens] int64.

    Returns q: [tokens, q_heads, head_dim] and k, v: [tokens, kv_heads, head_dim] (v a view of qkv);
    k and v are in the cache.
    """
    qkv = qkv.contiguous()
    num_tokens, (_, kv_heads, page, head_dim) = qkv.shape[0], k_cache.shape
    heads = qkv.view(num_tokens, -1, head_dim)
    q_heads = heads.shape[1] - 2 * kv_heads
    q = torch.empty(num_tokens, q_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty(num_tokens, kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    group = q_heads // kv_heads
    per_program = 1 if num_tokens <= _FEW_TOKENS else kv_heads
    _qk_norm_rope_store_kv_kernel[(num_tokens, kv_heads // per_program)](
        qkv,
        q_weight,
        k_weight,
        eps,
        cos_sin,
        k_cache,
        v_cache,
        slot_mapping,
        q,
        k,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=page,
        HEADS=per_program,
        Q_BLOCK=triton.next_power_of_2(per_program * group),
        KV_BLOCK=triton.next_power_of_2(per_program),
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1 if per_program == 1 else 4,
        **pdl(qkv),
    )
    return q, k, heads[:, q_heads + kv_heads :]
