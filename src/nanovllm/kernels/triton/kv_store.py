"""Writes the K and V of new tokens into the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.launch import pdl, wait_for_inputs


@triton.jit
def _store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_BLOCK)[:, None]
    dims = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (heads < KV_HEADS) & (dims < HEAD_DIM)
    wait_for_inputs(PDL)
    slot = tl.load(slot_ptr + token)
    source = (token * KV_HEADS + heads) * HEAD_DIM + dims
    target = ((slot // PAGE * KV_HEADS + heads) * PAGE + slot % PAGE) * HEAD_DIM + dims
    tl.store(k_cache_ptr + target, tl.load(k_ptr + source, mask=inside), mask=inside)
    tl.store(v_cache_ptr + target, tl.load(v_ptr + source, mask=inside), mask=inside)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k, v: [tokens, kv_heads, head_dim]; caches: [blocks, kv_heads, block_size, head_dim];
    slot_mapping: [tokens] int64.
    """
    num_tokens, kv_heads, head_dim = k.shape
    _store_kv_kernel[(num_tokens,)](
        k.contiguous(),
        v.contiguous(),
        k_cache,
        v_cache,
        slot_mapping,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE=k_cache.shape[2],
        HEADS_BLOCK=triton.next_power_of_2(kv_heads),
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        num_warps=4,
        **pdl(k),
    )
