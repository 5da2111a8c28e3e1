"""One step of online softmax over a tile of the paged KV cache (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).

The query heads that share a KV head, and in a prefill several tokens of them, are the rows of one small matrix, so that K and V
are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_tile(table_ptr, kv_head, first_token, kv_len, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Where tokens first_token .. first_token + TILE - 1 lie in the cache seen as [blocks * kv_heads * page, head_dim]."""
    if PAGE >= TILE:  # the whole tile is in one page
        page = tl.load(table_ptr + first_token // PAGE).to(tl.int64)
        rows = (page * KV_HEADS + kv_head) * PAGE + first_token % PAGE + tl.arange(0, TILE)
    else:
        tokens = first_token + tl.arange(0, TILE)
        pages = tl.load(table_ptr + tokens // PAGE, mask=tokens < kv_len, other=0).to(tl.int64)
        rows = (pages * KV_HEADS + kv_head) * PAGE + tokens % PAGE
    return rows


@triton.jit
def attend_to_tile(q, top, mass, acc, k_cache_ptr, v_cache_ptr, table_ptr, kv_head, first_token, kv_len, limits, scale_log2,
                    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
                    PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One step of online softmax. limits: [rows], the last token that each row of q sees, below kv_len; MASKED=False says that
    every row sees the whole tile.

    State of each row: top, its largest score (times log2 e); mass, the sum of exp2(score - top); acc, the sum weighted by it.
    """
    tokens = first_token + tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_DIM)
    rows = rows_of_tile(table_ptr, kv_head, first_token, kv_len, KV_HEADS, PAGE, TILE)
    places = rows[:, None] * HEAD_DIM + dims[None, :]
    exists = (tokens < kv_len)[:, None]
    if MASKED:
        keys = tl.load(k_cache_ptr + places, mask=exists, other=0.0)
    else:
        keys = tl.load(k_cache_ptr + places)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
    if MASKED:
        scores = tl.where(tokens[None, :] <= limits[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    if MASKED:
        values = tl.load(v_cache_ptr + places, mask=exists, other=0.0)
    else:
        values = tl.load(v_cache_ptr + places)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, mass * shrink + tl.sum(weights, axis=1), acc
