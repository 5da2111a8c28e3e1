"""Attention of one query token per entry over its paged KV: bound by memory bandwidth.

Every multiprocessor should have the same work, whatever the lengths. So the KV of all sequences and
heads is laid out as one line of units and cut into equal pieces, one per program ("stream-K", Osama
et al., 2023; "lean attention", Sanovar et al., 2024). An item (a sequence and a head) has as many
units as tiles of KV, after SETUP units that stand for the time its beginning takes:

    units      | . sequence 0, head 0 | . sequence 0, head 1 | . sequence 1, head 0 | ...
    programs   |      0      |      1      |      2      |      3      | ...

An item whose tiles lie in several pieces is computed by several programs. Each writes its partial
result, and the last one to finish (an atomic counter tells) combines them, so there is no second
kernel and no program waits.

With SHARED, the first `shared` tokens of an entry are already done (shared.py), and an item is the
rest: it begins with the state that they left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.triton.attention.tile import attend_to_tile, in_head, rows_of_tile
from nanovllm.kernels.triton.launch import prefetch_to_l2, wait_for_inputs

# measured on an H200 (ablations/LOG.md): 1 to 3 are alike, 0 costs 6 % where lengths differ
SETUP = tl.constexpr(2)


@triton.jit
def _units(seq_len, TILE: tl.constexpr):
    """The units of one item. An entry of length 0, which pads a batch, has none; such entries come
    last.
    """
    return tl.where(seq_len > 0, tl.cdiv(seq_len, TILE) + SETUP, 0)


@triton.jit
def _shared_by(shared_ptr, entry, SHARED: tl.constexpr):
    """Tokens of an entry that shared.py has done."""
    return tl.load(shared_ptr + entry) if SHARED else 0


@triton.jit
def _prefetch_tile(
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    seq_len,
    shared,
    unit,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Starts fetching the tile of unit number `unit` of an entry (counted over its heads)."""
    units = _units(seq_len - shared, TILE)
    first_token = shared + tl.maximum(unit % units - SETUP, 0) * TILE
    rows = rows_of_tile(table_ptr, unit // units, first_token, seq_len, KV_HEADS, PAGE, TILE)
    # sectors of 32 bytes, in elements of two
    lines = tl.arange(0, triton.next_power_of_2(HEAD_DIM) // 16) * 16
    if lines.shape[0] * 16 != HEAD_DIM:
        lines = tl.minimum(lines, HEAD_DIM - 1)
    exists = (first_token + tl.arange(0, TILE) < seq_len)[:, None]
    places = tl.where(exists, rows[:, None], tl.min(rows, axis=0)) * HEAD_DIM + lines[None, :]
    prefetch_to_l2(k_cache_ptr + places)
    prefetch_to_l2(v_cache_ptr + places)


@triton.jit(do_not_specialize=["num_entries"])
def cut_kernel(
    seq_lens_ptr,
    shared_ptr,
    unit_starts_ptr,
    first_entries_ptr,
    totals_ptr,
    num_entries,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes where each program's piece begins; runs as many programs as the decode kernel, and
    program 0 also writes the totals.
    """
    program = tl.program_id(0)
    entries = tl.arange(0, BLOCK)
    inside = entries < num_entries
    wait_for_inputs(PDL)
    lengths = tl.load(seq_lens_ptr + entries, mask=inside, other=0)
    if SHARED:
        lengths -= tl.load(shared_ptr + entries, mask=inside, other=0)
    units = _units(lengths, TILE) * KV_HEADS
    ends = tl.cumsum(units, axis=0)
    total = tl.sum(units, axis=0)
    per_program = tl.cdiv(total, tl.num_programs(0))
    before = (ends <= program * per_program) & inside
    tl.store(first_entries_ptr + program, tl.sum(before.to(tl.int32), axis=0))
    if program == 0:
        tl.store(unit_starts_ptr + entries, ends - units, mask=inside)
        tl.store(totals_ptr, per_program)
        tl.store(totals_ptr + 1, total)


@triton.jit
def _combine(
    out_ptr,
    partial_acc_ptr,
    partial_top_ptr,
    partial_mass_ptr,
    first_program,
    last_program,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Combines the partial results of programs [first_program, last_program] for one item.

    Eight at a time, so that their loads are in flight together: a short decode step waits for them.
    """
    members = tl.arange(0, triton.next_power_of_2(GROUP))
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    real = members < GROUP
    top = tl.full([triton.next_power_of_2(GROUP)], float("-inf"), tl.float32)
    mass = tl.zeros([triton.next_power_of_2(GROUP)], tl.float32)
    acc = tl.zeros([triton.next_power_of_2(GROUP), triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for first in range(first_program, last_program + 1, 8):
        for i in tl.static_range(8):
            other = first + i
            # One comparison of a block: the interpreter of Triton 3.9 accepts no mask of a block `&`
            # a scalar.
            exists = members < tl.where(other <= last_program, GROUP, 0)
            theirs = (other * 2 + (other == first_program).to(tl.int32)) * GROUP + members
            their_top = tl.load(partial_top_ptr + theirs, mask=exists, other=float("-inf"))
            their_mass = tl.load(partial_mass_ptr + theirs, mask=exists, other=0.0)
            their_acc = tl.load(
                partial_acc_ptr + theirs[:, None] * HEAD_DIM + dims[None, :],
                mask=in_head(exists, dims, HEAD_DIM),
                other=0.0,
            )
            new_top = tl.where(real, tl.maximum(top, their_top), 0.0)
            shrink, their_shrink = tl.exp2(top - new_top), tl.exp2(their_top - new_top)
            mass = mass * shrink + their_mass * their_shrink
            acc = acc * shrink[:, None] + their_acc * their_shrink[:, None]
            top = new_top
    out = (acc / mass[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + members[:, None] * HEAD_DIM + dims[None, :],
        out,
        mask=in_head(real, dims, HEAD_DIM),
    )


@triton.jit
def _decode_tiles(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    shared_acc_ptr,
    shared_top_ptr,
    shared_mass_ptr,
    out_ptr,
    partial_acc_ptr,
    partial_top_ptr,
    partial_mass_ptr,
    arrival_ptr,
    scale_log2,
    entry,
    kv_head,
    seq_len,
    shared,
    first_tile,
    last_tile,
    first_program,
    last_program,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Tiles [first_tile, last_tile) of an item that programs [first_program, last_program] share."""
    program = tl.program_id(0)
    members = tl.arange(0, ROWS)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    real = members < GROUP
    q_rows = (entry.to(tl.int64) * KV_HEADS + kv_head) * GROUP + members
    places = q_rows[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + places, mask=in_head(real, dims, HEAD_DIM), other=0.0)
    limits = tl.zeros([ROWS], tl.int32) + seq_len - 1
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    if SHARED:
        # one comparison, as in _combine
        begun = members < tl.where((shared > 0) & (first_tile == 0), GROUP, 0)
        top = tl.load(shared_top_ptr + q_rows, mask=begun, other=float("-inf"))
        mass = tl.load(shared_mass_ptr + q_rows, mask=begun, other=0.0)
        acc = tl.load(shared_acc_ptr + places, mask=in_head(begun, dims, HEAD_DIM), other=0.0)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        top, mass, acc = attend_to_tile(
            q,
            top,
            mass,
            acc,
            k_cache_ptr,
            v_cache_ptr,
            table_ptr,
            kv_head,
            shared + tile * TILE,
            seq_len,
            limits,
            scale_log2,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            TILE,
            PRECISION,
            MASKED=True,
        )
    if first_program == last_program:
        tl.store(
            out_ptr + places, (acc / mass[:, None]).to(q.dtype), mask=in_head(real, dims, HEAD_DIM)
        )
    else:
        mine = (program * 2 + (program == first_program).to(tl.int32)) * GROUP + members
        tl.store(partial_top_ptr + mine, top, mask=real)
        tl.store(partial_mass_ptr + mine, mass, mask=real)
        tl.store(
            partial_acc_ptr + mine[:, None] * HEAD_DIM + dims[None, :],
            acc,
            mask=in_head(real, dims, HEAD_DIM),
        )
        tl.debug_barrier()  # all threads have written before one of them counts the arrival
        if (
            tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu")
            == last_program - first_program
        ):
            out_row = (entry.to(tl.int64) * KV_HEADS + kv_head) * GROUP
            _combine(
                out_ptr + out_row * HEAD_DIM,
                partial_acc_ptr,
                partial_top_ptr,
                partial_mass_ptr,
                first_program,
                last_program,
                GROUP,
                HEAD_DIM,
            )
            tl.store(arrival_ptr, 0)  # reset for the next layer


@triton.jit(do_not_specialize=["table_stride"])  # it differs between eager steps
def decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    seq_lens_ptr,
    shared_ptr,
    shared_acc_ptr,
    shared_top_ptr,
    shared_mass_ptr,
    unit_starts_ptr,
    first_entries_ptr,
    totals_ptr,
    out_ptr,
    partial_acc_ptr,
    partial_top_ptr,
    partial_mass_ptr,
    arrivals_ptr,
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
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One piece of the line of tiles. Each program has two places for partial results: 0 for an
    item that began in an earlier program, 1 for one that begins here.
    """
    program = tl.program_id(0)
    # The cut and the tables were written long before the previous kernel: `prepare` comes before
    # the whole model.
    per_program = tl.load(totals_ptr)
    at = program * per_program
    end = tl.minimum(at + per_program, tl.load(totals_ptr + 1))
    entry = tl.load(first_entries_ptr + program)
    if PDL:  # noqa: SIM102  a constant, and a condition of the device
        if at < end:
            _prefetch_tile(
                k_cache_ptr,
                v_cache_ptr,
                tables_ptr + entry.to(tl.int64) * table_stride,
                tl.load(seq_lens_ptr + entry),
                _shared_by(shared_ptr, entry, SHARED),
                at - tl.load(unit_starts_ptr + entry),
                KV_HEADS,
                HEAD_DIM,
                PAGE,
                TILE,
            )
    wait_for_inputs(PDL)
    while at < end:
        seq_len = tl.load(seq_lens_ptr + entry)
        shared = _shared_by(shared_ptr, entry, SHARED)
        units = _units(seq_len - shared, TILE)
        entry_start = tl.load(unit_starts_ptr + entry)
        kv_head = (at - entry_start) // units
        item_start = entry_start + kv_head * units
        item_end = item_start + units
        stop = tl.minimum(item_end, end)
        # negative: the item's setup
        first_tile, last_tile = at - item_start - SETUP, stop - item_start - SETUP
        first_program, last_program = (
            (item_start + SETUP) // per_program,
            (item_end - 1) // per_program,
        )
        if last_tile > 0:
            _decode_tiles(
                q_ptr,
                k_cache_ptr,
                v_cache_ptr,
                tables_ptr + entry.to(tl.int64) * table_stride,
                shared_acc_ptr,
                shared_top_ptr,
                shared_mass_ptr,
                out_ptr,
                partial_acc_ptr,
                partial_top_ptr,
                partial_mass_ptr,
                arrivals_ptr + entry * KV_HEADS + kv_head,
                scale_log2,
                entry,
                kv_head,
                seq_len,
                shared,
                tl.maximum(first_tile, 0),
                last_tile,
                first_program,
                last_program,
                KV_HEADS,
                GROUP,
                ROWS,
                HEAD_DIM,
                PAGE,
                TILE,
                STAGES,
                PRECISION,
                SHARED,
            )
        entry += (stop == entry_start + units * KV_HEADS).to(tl.int32)
        at = stop
