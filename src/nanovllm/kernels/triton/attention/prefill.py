"""Attention of many query tokens per entry: bound by arithmetic.

One program per tile of query tokens and KV head. Keys and values are read from the cache's blocks,
so a chunk or a cached prefix needs no special case.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.triton.attention.tile import attend_to_tile, in_head
from nanovllm.kernels.triton.launch import wait_for_inputs


@triton.jit(
    do_not_specialize=["num_decodes", "num_entries"],
    do_not_specialize_on_alignment=["tile_tokens_ptr"],
)
def tiles_kernel(
    query_start_ptr,
    tile_entries_ptr,
    tile_tokens_ptr,
    num_decodes,
    num_entries,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Entry and first query token of each tile of TOKENS query tokens, the last tiles (the longest
    contexts) first. One program per tile; programs beyond the number of tiles write -1 as their
    entry.
    """
    entries = num_decodes + tl.arange(0, BLOCK)
    inside = entries < num_entries
    wait_for_inputs(PDL)
    starts = tl.load(query_start_ptr + entries, mask=inside, other=0)
    lengths = tl.load(query_start_ptr + entries + 1, mask=inside, other=0) - starts
    tiles = tl.cdiv(lengths, TOKENS)
    ends = tl.cumsum(tiles, axis=0)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.sum((ends <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(tl.arange(0, BLOCK) < index, tiles, 0), axis=0)
    exists = tile < tl.sum(tiles, axis=0)
    tl.store(tile_entries_ptr + tl.program_id(0), tl.where(exists, num_decodes + index, -1))
    tl.store(tile_tokens_ptr + tl.program_id(0), ((tile - before) * TOKENS).to(tl.int32))


# these differ between steps
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tile_tokens_ptr"])
def prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    seq_lens_ptr,
    query_start_ptr,
    tile_entries_ptr,
    tile_tokens_ptr,
    out_ptr,
    table_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS // GROUP query tokens of one entry, from its token tile_tokens[program_id(0)] on, and
    one KV head.
    """
    tokens_per_tile: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    wait_for_inputs(PDL)
    entry = tl.load(tile_entries_ptr + tl.program_id(0))
    if entry < 0:
        return
    first = tl.load(tile_tokens_ptr + tl.program_id(0))
    query_start = tl.load(query_start_ptr + entry)
    query_len = tl.load(query_start_ptr + entry + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + entry)
    context = seq_len - query_len  # tokens of the sequence before this step

    rows = tl.arange(0, ROWS)
    tokens = first + rows // GROUP
    real = (rows < tokens_per_tile * GROUP) & (tokens < query_len)
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    places = ((query_start + tokens).to(tl.int64) * KV_HEADS * GROUP + heads)[
        :, None
    ] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + places, mask=in_head(real, dims, HEAD_DIM), other=0.0)
    limits = tl.minimum(context + tokens, seq_len - 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    table_ptr = tables_ptr + entry.to(tl.int64) * table_stride
    kv_len = tl.minimum(seq_len, context + first + tokens_per_tile)
    num_whole = (context + first + 1) // TILE  # tiles that even the first row sees all of
    for tile in tl.range(0, num_whole, num_stages=STAGES):
        top, mass, acc = attend_to_tile(
            q,
            top,
            mass,
            acc,
            k_cache_ptr,
            v_cache_ptr,
            table_ptr,
            kv_head,
            tile * TILE,
            kv_len,
            limits,
            scale_log2,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            TILE,
            PRECISION,
            MASKED=False,
        )
    for tile in tl.range(num_whole, tl.cdiv(kv_len, TILE), num_stages=STAGES):
        top, mass, acc = attend_to_tile(
            q,
            top,
            mass,
            acc,
            k_cache_ptr,
            v_cache_ptr,
            table_ptr,
            kv_head,
            tile * TILE,
            kv_len,
            limits,
            scale_log2,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            TILE,
            PRECISION,
            MASKED=True,
        )
    tl.store(
        out_ptr + places, (acc / mass[:, None]).to(q.dtype), mask=in_head(real, dims, HEAD_DIM)
    )
