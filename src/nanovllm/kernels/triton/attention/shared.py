"""Decode attention over a prefix that several sequences share: its KV is read once for all of
them.

Online softmax may be split anywhere, so a sequence's attention is split where its shared blocks end
("cascade inference", Ye et al., 2024; Juravsky et al., "Hydragen", 2024):

    sequence 0   [ shared blocks         ][ own tokens     ]
    sequence 1   [ the same blocks       ][ own tokens  ]        one program per KV head reads the shared blocks, with the queries
    sequence 2   [ the same blocks       ][ own tokens        ]  of all members as rows of one matrix; decode.py continues

Which sequences share is found on the device, from the block tables: the prefix cache gives equal
prefixes the same blocks. A *group* is the sequences with the same first block. It shares the blocks
that all its members have in common: at least one, since a block with several owners is full, and
the query's own token lies after it. A *squad* is up to `MEMBERS` of a group, whose queries are
processed together. For five entries whose first blocks are 7, 4, 7, 7, 4, with squads of two:

    entry          0  1  2  3  4
    leader         0  1  0  0  1       the group's first entry
    rank           0  0  1  2  1       in the group
    size           3  2  3  3  2       of the group
    order          0  2  3  1  4       entries, group after group
    squads         0: order[0:2]   1: order[3:5]   2: order[2:3]
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.triton.attention.tile import attend_to_tile, in_head
from nanovllm.kernels.triton.launch import wait_for_inputs


@triton.jit(do_not_specialize=["table_stride", "num_entries"])
def groups_kernel(
    tables_ptr,
    seq_lens_ptr,
    leaders_ptr,
    ranks_ptr,
    sizes_ptr,
    pages_ptr,
    table_stride,
    num_entries,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per entry: leaders, ranks, sizes as above; pages: how many blocks it has in
    common with its leader. All are [entries] int32.
    """
    entry = tl.program_id(0)
    others = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    inside = others < num_entries
    # An entry within its first block shares none, and padding has length 0: each is its own group.
    has_page = tl.load(seq_lens_ptr + others, mask=inside, other=0) > PAGE
    firsts = tl.load(tables_ptr + others.to(tl.int64) * table_stride, mask=has_page, other=0)
    firsts = tl.where(has_page, firsts, -1 - others)
    in_group = inside & (firsts == tl.sum(tl.where(others == entry, firsts, 0), axis=0))
    leader = tl.min(tl.where(in_group, others, BLOCK), axis=0)
    seq_len = tl.minimum(tl.load(seq_lens_ptr + entry), tl.load(seq_lens_ptr + leader))
    full = tl.maximum(seq_len - 1, 0) // PAGE  # the query's own token is never in a shared page
    common = full
    for first_column in range(0, full, PAGES):
        columns = first_column + tl.arange(0, PAGES)
        mine = tl.load(
            tables_ptr + entry.to(tl.int64) * table_stride + columns, mask=columns < full, other=0
        )
        theirs = tl.load(
            tables_ptr + leader.to(tl.int64) * table_stride + columns, mask=columns < full, other=0
        )
        common = tl.minimum(common, tl.min(tl.where(mine != theirs, columns, full), axis=0))
    tl.store(leaders_ptr + entry, leader)
    tl.store(ranks_ptr + entry, tl.sum((in_group & (others < entry)).to(tl.int32), axis=0))
    tl.store(sizes_ptr + entry, tl.sum(in_group.to(tl.int32), axis=0))
    tl.store(pages_ptr + entry, common)


@triton.jit(do_not_specialize=["num_entries", "num_squads"])
def squads_kernel(
    leaders_ptr,
    ranks_ptr,
    sizes_ptr,
    pages_ptr,
    shared_ptr,
    order_ptr,
    squad_starts_ptr,
    squad_sizes_ptr,
    num_entries,
    num_squads,
    MEMBERS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per entry. shared: tokens of its group's prefix, 0 where it is alone; order as
    above: [entries] int32. squad_starts: index into `order`; squad_sizes: 0 after the last squad:
    [squads] int32, with room for half as many squads as entries.
    """
    entry = tl.program_id(0)
    others = tl.arange(0, BLOCK)
    inside = others < num_entries
    wait_for_inputs(PDL)
    leaders = tl.load(leaders_ptr + others, mask=inside, other=BLOCK)
    ranks = tl.load(ranks_ptr + others, mask=inside, other=1)
    sizes = tl.load(sizes_ptr + others, mask=inside, other=0)
    pages = tl.load(pages_ptr + others, mask=inside, other=0)
    leader, rank, size = (
        tl.load(leaders_ptr + entry),
        tl.load(ranks_ptr + entry),
        tl.load(sizes_ptr + entry),
    )
    common = tl.min(tl.where(leaders == leader, pages, 1 << 30), axis=0)
    place = tl.sum((leaders < leader).to(tl.int32), axis=0) + rank
    tl.store(shared_ptr + entry, tl.where(size > 1, common * PAGE, 0))
    tl.store(order_ptr + place, entry)
    begins = (sizes > 1) & (ranks % MEMBERS == 0)  # a squad
    if (size > 1) & (rank % MEMBERS == 0):
        squad = tl.sum((begins & (others < entry)).to(tl.int32), axis=0)
        tl.store(squad_starts_ptr + squad, place)
        tl.store(squad_sizes_ptr + squad, tl.minimum(size - rank, MEMBERS))
    if (entry >= tl.sum(begins.to(tl.int32), axis=0)) & (entry < num_squads):
        tl.store(squad_sizes_ptr + entry, 0)


@triton.jit
def _attend(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    shared_ptr,
    order_ptr,
    acc_ptr,
    top_ptr,
    mass_ptr,
    first_member,
    size,
    kv_head,
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
):
    """Members first_member, first_member + 1, ... of a squad of `size`, as many as ROWS hold;
    order_ptr points to the squad.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    member = first_member + rows // GROUP
    real = (rows < ROWS // GROUP * GROUP) & (member < size)
    entries = tl.load(order_ptr + member, mask=real, other=0).to(tl.int64)
    any_entry = tl.load(order_ptr).to(tl.int64)  # they share the pages, so any table will do
    shared = tl.load(shared_ptr + any_entry)
    q_rows = (entries * KV_HEADS + kv_head) * GROUP + rows % GROUP
    places = q_rows[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + places, mask=in_head(real, dims, HEAD_DIM), other=0.0)
    limits = tl.zeros([ROWS], tl.int32) + shared - 1
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for tile in tl.range(0, tl.cdiv(shared, TILE), num_stages=STAGES):
        top, mass, acc = attend_to_tile(
            q,
            top,
            mass,
            acc,
            k_cache_ptr,
            v_cache_ptr,
            tables_ptr + any_entry * table_stride,
            kv_head,
            tile * TILE,
            shared,
            limits,
            scale_log2,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            TILE,
            PRECISION,
            MASKED=PAGE % TILE != 0,
        )
    tl.store(top_ptr + q_rows, top, mask=real)
    tl.store(mass_ptr + q_rows, mass, mask=real)
    tl.store(acc_ptr + places, acc, mask=in_head(real, dims, HEAD_DIM))


@triton.jit(do_not_specialize=["table_stride", "num_squads"])
def shared_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    shared_ptr,
    order_ptr,
    squad_starts_ptr,
    squad_sizes_ptr,
    acc_ptr,
    top_ptr,
    mass_ptr,
    num_squads,
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
    """Axis 0: a KV head; axis 1: as many members as ROWS hold; axis 2: every so many-th squad.
    Writes the state of online softmax after the shared tokens, from which decode.py continues: acc
    [entries, q_heads, head_dim], top, mass [entries, q_heads], float32.
    """
    kv_head = tl.program_id(0)
    first_member = tl.program_id(1) * (ROWS // GROUP)
    squad = tl.program_id(2)
    size = tl.load(squad_sizes_ptr + squad)  # found long before the previous kernel
    # also where there is nothing to do: the next kernel may start when all programs have ended
    wait_for_inputs(PDL)
    while size > 0:
        if first_member < size:
            _attend(
                q_ptr,
                k_cache_ptr,
                v_cache_ptr,
                tables_ptr,
                shared_ptr,
                order_ptr + tl.load(squad_starts_ptr + squad),
                acc_ptr,
                top_ptr,
                mass_ptr,
                first_member,
                size,
                kv_head,
                table_stride,
                scale_log2,
                KV_HEADS,
                GROUP,
                ROWS,
                HEAD_DIM,
                PAGE,
                TILE,
                STAGES,
                PRECISION,
            )
        squad += tl.num_programs(2)
        size = tl.load(squad_sizes_ptr + squad, mask=squad < num_squads, other=0)
