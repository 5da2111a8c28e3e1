"""One step of online softmax over a tile of the paged KV cache (Milakov and Gimelshein, 2018; Dao
et al., FlashAttention, 2022).

The query heads that share a KV head, and in a prefill several of their tokens, are the rows of one
small matrix, so that K and V are read once. Where head_dim is no power of two, tiles have columns
up to the next one: `in_head` masks them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_tile(
    table_ptr,
    kv_head,
    first_token,
    kv_len,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Where tokens first_token .. first_token + TILE - 1 lie in the cache seen as [blocks *
    kv_heads * page, head_dim].
    """
    if PAGE >= TILE:  # the whole tile is in one page
        page = tl.load(table_ptr + first_token // PAGE).to(tl.int64)
        rows = (page * KV_HEADS + kv_head) * PAGE + first_token % PAGE + tl.arange(0, TILE)
    else:
        tokens = first_token + tl.arange(0, TILE)
        pages = tl.load(table_ptr + tokens // PAGE, mask=tokens < kv_len, other=0).to(tl.int64)
        rows = (pages * KV_HEADS + kv_head) * PAGE + tokens % PAGE
    return rows


@triton.jit
def in_head(rows, dims, HEAD_DIM: tl.constexpr):
    """The mask [rows, dims] of rows that are real ([rows]) and columns below HEAD_DIM."""
    mask = rows[:, None]
    if dims.shape[0] != HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _load_tile(pointers, exists, dims, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values: [tokens, dims]. exists: [tokens], used only where MASKED."""
    if MASKED:
        tile = tl.load(pointers, mask=in_head(exists, dims, HEAD_DIM), other=0.0)
    elif dims.shape[0] != HEAD_DIM:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def attend_to_tile(
    q,
    top,
    mass,
    acc,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    kv_head,
    first_token,
    kv_len,
    limits,
    scale_log2,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of online softmax. limits: [rows], the last token that each row of q sees, below
    kv_len; MASKED=False says that every row sees the whole tile.

    State of each row: top, its largest score (times log2 e); mass, the sum of exp2(score - top);
    acc, the sum of values weighted by it.
    """
    tokens = first_token + tl.arange(0, TILE)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    rows = rows_of_tile(table_ptr, kv_head, first_token, kv_len, KV_HEADS, PAGE, TILE)
    places = rows[:, None] * HEAD_DIM + dims[None, :]
    exists = tokens < kv_len
    # a small cache holds e4m3
    keys = _load_tile(k_cache_ptr + places, exists, dims, HEAD_DIM, MASKED).to(q.dtype)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
    if MASKED:
        scores = tl.where(tokens[None, :] <= limits[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    values = _load_tile(v_cache_ptr + places, exists, dims, HEAD_DIM, MASKED).to(q.dtype)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, mass * shrink + tl.sum(weights, axis=1), acc
