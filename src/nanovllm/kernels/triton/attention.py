"""Attention over the paged KV cache, in two kernels that share one step of online softmax (Milakov and Gimelshein, 2018;
Dao et al., FlashAttention, 2022).

Both put the query heads that share a KV head into the rows of one small matrix, so that K and V are read once.

*Decode* is bound by memory: what counts is that every multiprocessor has the same work, whatever the lengths. So the KV of
all sequences and heads is laid out as one line of units, and cut into equal pieces, one a program ("stream-K", Osama et al.,
2023; "lean attention", Sanovar et al., 2024). An item (a sequence and a head) is as many units as it has tiles of KV, after
SETUP units that stand for the time its beginning takes:

    units      | . sequence 0, head 0 | . sequence 0, head 1 | . sequence 1, head 0 | ...
    programs   |      0      |      1      |      2      |      3      | ...

An item whose tiles lie in several pieces is computed by several programs. Each writes its partial result, and
the one that comes last (an atomic counter tells) combines them. So there is no second kernel, and nobody waits.

*Prefill* is bound by arithmetic: one program a tile of query tokens and KV head; keys and values come from the pages, so that
a chunk and a cached prefix are nothing special.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.triton.launch import pdl, prefetch_to_l2, upload, wait_for_inputs

_LOG2_E = 1.4426950408889634


class Tiling(NamedTuple):
    """How a kernel is cut: KV tokens a tile, warps and pipeline stages a program, rows of the query tile."""

    kv_tile: int
    warps: int
    stages: int
    rows: int


PROGRAMS_PER_SM = 3
SETUP = tl.constexpr(1)
LEAST_UNITS = 1
"""Of a piece: in short items, sharing them out costs more than it brings."""


def tilings(dtype: torch.dtype, shared_memory: int) -> tuple[Tiling, Tiling]:
    """For decode and prefill, on a GPU whose programs may have `shared_memory` bytes."""
    # Looking up a tile's page takes stages as well: five are two tiles in flight.
    decode, prefill = Tiling(kv_tile=64, warps=4, stages=5, rows=16), Tiling(kv_tile=64, warps=4, stages=5, rows=64)
    if shared_memory >= 200 << 10:
        prefill = Tiling(kv_tile=64, warps=8, stages=5, rows=128)
    if dtype == torch.float32:
        decode, prefill = decode._replace(kv_tile=32), prefill._replace(kv_tile=32)
    return decode, prefill


@triton.jit
def _rows_of_tile(table_ptr, kv_head, first_token, kv_len, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr):
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
def _attend_to_tile(q, top, mass, acc, k_cache_ptr, v_cache_ptr, table_ptr, kv_head, first_token, kv_len, limits, scale_log2,
                    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
                    PRECISION: tl.constexpr):
    """One step of online softmax. limits: [rows], the last token that each row of q sees, below kv_len.

    State of each row: top, its largest score (times log2 e); mass, the sum of exp2(score - top); acc, the sum weighted by it.
    """
    tokens = first_token + tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_DIM)
    rows = _rows_of_tile(table_ptr, kv_head, first_token, kv_len, KV_HEADS, PAGE, TILE)
    places = rows[:, None] * HEAD_DIM + dims[None, :]
    exists = (tokens < kv_len)[:, None]
    keys = tl.load(k_cache_ptr + places, mask=exists, other=0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
    scores = tl.where(tokens[None, :] <= limits[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    values = tl.load(v_cache_ptr + places, mask=exists, other=0.0)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, mass * shrink + tl.sum(weights, axis=1), acc


@triton.jit
def _units(seq_len, TILE: tl.constexpr):
    """Of one item. An entry of length 0 (it pads a batch) has none; such entries come last."""
    return tl.where(seq_len > 0, tl.cdiv(seq_len, TILE) + SETUP, 0)


@triton.jit
def _prefetch_tile(k_cache_ptr, v_cache_ptr, table_ptr, seq_len, unit, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                   PAGE: tl.constexpr, TILE: tl.constexpr):
    """Starts fetching the tile of unit number `unit` of an entry (counted over its heads)."""
    units = _units(seq_len, TILE)
    first_token = tl.maximum(unit % units - SETUP, 0) * TILE
    rows = _rows_of_tile(table_ptr, unit // units, first_token, seq_len, KV_HEADS, PAGE, TILE)
    lines = tl.arange(0, HEAD_DIM // 64 if HEAD_DIM > 64 else 1) * 64  # of 128 bytes, in elements of two
    exists = (first_token + tl.arange(0, TILE) < seq_len)[:, None]
    places = tl.where(exists, rows[:, None], tl.min(rows, axis=0)) * HEAD_DIM + lines[None, :]
    prefetch_to_l2(k_cache_ptr + places)
    prefetch_to_l2(v_cache_ptr + places)


@triton.jit(do_not_specialize=["num_entries"])
def _cut_kernel(seq_lens_ptr, unit_starts_ptr, first_entries_ptr, totals_ptr, num_entries, KV_HEADS: tl.constexpr,
                TILE: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Where each program's piece begins. One program a program of the decode kernel; number 0 also writes what all share."""
    program = tl.program_id(0)
    entries = tl.arange(0, BLOCK)
    inside = entries < num_entries
    wait_for_inputs(PDL)
    units = _units(tl.load(seq_lens_ptr + entries, mask=inside, other=0), TILE) * KV_HEADS
    ends = tl.cumsum(units, axis=0)
    total = tl.sum(units, axis=0)
    per_program = tl.maximum(tl.cdiv(total, tl.num_programs(0)), LEAST)
    before = (ends <= program * per_program) & inside
    tl.store(first_entries_ptr + program, tl.sum(before.to(tl.int32), axis=0))
    if program == 0:
        tl.store(unit_starts_ptr + entries, ends - units, mask=inside)
        tl.store(totals_ptr, per_program)
        tl.store(totals_ptr + 1, total)


@triton.jit
def _decode_tiles(
    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, out_ptr, partial_acc_ptr, partial_top_ptr, partial_mass_ptr, arrival_ptr,
    scale_log2, entry, kv_head, seq_len, first_tile, last_tile, first_program, last_program,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles [first_tile, last_tile) of an item that programs [first_program, last_program] share."""
    program = tl.program_id(0)
    members = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    real = members < GROUP
    q_rows = (entry.to(tl.int64) * KV_HEADS + kv_head) * GROUP + members
    places = q_rows[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + places, mask=real[:, None], other=0.0)
    limits = tl.zeros([ROWS], tl.int32) + seq_len - 1
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        top, mass, acc = _attend_to_tile(
            q, top, mass, acc, k_cache_ptr, v_cache_ptr, table_ptr, kv_head, tile * TILE, seq_len, limits, scale_log2,
            KV_HEADS, HEAD_DIM, PAGE, TILE, PRECISION)  # fmt: skip
    if first_program == last_program:
        tl.store(out_ptr + places, (acc / mass[:, None]).to(q.dtype), mask=real[:, None])
    else:
        mine = (program * 2 + (program == first_program).to(tl.int32)) * GROUP + members
        tl.store(partial_top_ptr + mine, top, mask=real)
        tl.store(partial_mass_ptr + mine, mass, mask=real)
        tl.store(partial_acc_ptr + mine[:, None] * HEAD_DIM + dims[None, :], acc, mask=real[:, None])
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu") == last_program - first_program:
            top = tl.full([ROWS], float("-inf"), tl.float32)
            mass = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
            for other in range(first_program, last_program + 1):
                theirs = (other * 2 + (other == first_program).to(tl.int32)) * GROUP + members
                their_top = tl.load(partial_top_ptr + theirs, mask=real, other=0.0)
                their_mass = tl.load(partial_mass_ptr + theirs, mask=real, other=1.0)
                their_acc = tl.load(partial_acc_ptr + theirs[:, None] * HEAD_DIM + dims[None, :], mask=real[:, None], other=0.0)
                new_top = tl.maximum(top, their_top)
                shrink, their_shrink = tl.exp2(top - new_top), tl.exp2(their_top - new_top)
                mass = mass * shrink + their_mass * their_shrink
                acc = acc * shrink[:, None] + their_acc * their_shrink[:, None]
                top = new_top
            tl.store(out_ptr + places, (acc / mass[:, None]).to(q.dtype), mask=real[:, None])
            tl.store(arrival_ptr, 0)  # as the next layer wants it


@triton.jit
def _decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, seq_lens_ptr, unit_starts_ptr, first_entries_ptr, totals_ptr, out_ptr,
    partial_acc_ptr, partial_top_ptr, partial_mass_ptr, arrivals_ptr, table_stride, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One piece of the line of tiles. Partial results lie in two places for each program: 0 for an item that began in an
    earlier program, 1 for one that begins here."""
    program = tl.program_id(0)
    # The cut and the tables were written long before the previous kernel: `prepare` comes before the whole model.
    per_program = tl.load(totals_ptr)
    at = program * per_program
    end = tl.minimum(at + per_program, tl.load(totals_ptr + 1))
    entry = tl.load(first_entries_ptr + program)
    if PDL:
        if at < end:
            _prefetch_tile(k_cache_ptr, v_cache_ptr, tables_ptr + entry.to(tl.int64) * table_stride, tl.load(seq_lens_ptr + entry),
                           at - tl.load(unit_starts_ptr + entry), KV_HEADS, HEAD_DIM, PAGE, TILE)  # fmt: skip
    wait_for_inputs(PDL)
    while at < end:
        seq_len = tl.load(seq_lens_ptr + entry)
        units = _units(seq_len, TILE)
        entry_start = tl.load(unit_starts_ptr + entry)
        kv_head = (at - entry_start) // units
        item_start = entry_start + kv_head * units
        item_end = item_start + units
        stop = tl.minimum(item_end, end)
        first_tile, last_tile = at - item_start - SETUP, stop - item_start - SETUP  # negative: the item's setup
        first_program, last_program = (item_start + SETUP) // per_program, (item_end - 1) // per_program
        if last_tile > 0:
            _decode_tiles(
                q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr + entry.to(tl.int64) * table_stride, out_ptr, partial_acc_ptr,
                partial_top_ptr, partial_mass_ptr, arrivals_ptr + entry * KV_HEADS + kv_head, scale_log2, entry, kv_head, seq_len,
                tl.maximum(first_tile, 0), last_tile, first_program, last_program,
                KV_HEADS, GROUP, ROWS, HEAD_DIM, PAGE, TILE, STAGES, PRECISION)  # fmt: skip
        entry += (stop == entry_start + units * KV_HEADS).to(tl.int32)
        at = stop


@triton.jit
def _prefill_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, seq_lens_ptr, query_start_ptr, tile_entries_ptr, tile_tokens_ptr, out_ptr,
    table_stride, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS // GROUP query tokens of one entry, from its token tile_tokens[program_id(0)] on, and one KV head."""
    tokens_per_tile: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    wait_for_inputs(PDL)
    entry = tl.load(tile_entries_ptr + tl.program_id(0))
    first = tl.load(tile_tokens_ptr + tl.program_id(0))
    query_start = tl.load(query_start_ptr + entry)
    query_len = tl.load(query_start_ptr + entry + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + entry)
    context = seq_len - query_len  # tokens of the sequence before this step

    rows = tl.arange(0, ROWS)
    tokens = first + rows // GROUP
    real = (rows < tokens_per_tile * GROUP) & (tokens < query_len)
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, HEAD_DIM)
    places = ((query_start + tokens).to(tl.int64) * KV_HEADS * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + places, mask=real[:, None], other=0.0)
    limits = tl.minimum(context + tokens, seq_len - 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    table_ptr = tables_ptr + entry.to(tl.int64) * table_stride
    kv_len = tl.minimum(seq_len, context + first + tokens_per_tile)
    for tile in tl.range(0, tl.cdiv(kv_len, TILE), num_stages=STAGES):
        top, mass, acc = _attend_to_tile(
            q, top, mass, acc, k_cache_ptr, v_cache_ptr, table_ptr, kv_head, tile * TILE, kv_len, limits, scale_log2,
            KV_HEADS, HEAD_DIM, PAGE, TILE, PRECISION)  # fmt: skip
    tl.store(out_ptr + places, (acc / mass[:, None]).to(q.dtype), mask=real[:, None])


@dataclass(slots=True)
class _Prepared:
    """What is the same in all layers."""

    unit_starts: Tensor | None = None  # [decodes] int32: units of the entries before each
    first_entries: Tensor | None = None  # [programs] int32: the entry in which each piece begins
    totals: Tensor | None = None  # [2] int32: units a program, units in all
    arrivals: Tensor | None = None  # [decodes * kv_heads] int32: zero between launches
    partials: tuple[Tensor, Tensor, Tensor] | None = None  # acc [programs, 2, group, head_dim], top, mass [programs, 2, group]
    prefill_tiles: Tensor | None = None  # [2, query tiles] int32: entry, its first query token


class TritonAttention:
    """The same interface as TorchAttention. Pages are a power of two of tokens, 16 or more; head_dim a power of two."""

    def __init__(self, num_kv_heads: int, block_size: int, scale: float, dtype: torch.dtype) -> None:
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size={block_size} cannot be used with attention_backend='triton': take a power of two, 16 or more")
        self.num_kv_heads = num_kv_heads
        self.block_size = block_size
        self.scale_log2 = scale * _LOG2_E
        self.precision = "ieee" if dtype == torch.float32 else "tf32"  # tf32 says nothing of bfloat16
        num_sms, shared_memory = 4, 99 << 10  # of the interpreter
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties()
            num_sms, shared_memory = properties.multi_processor_count, properties.shared_memory_per_block_optin
        self.decode, self.prefill = tilings(dtype, shared_memory)
        self.num_programs = num_sms * PROGRAMS_PER_SM

    def prepare(self, batch: ForwardBatch) -> None:
        """Cuts the decodes' work, on the device: its lengths are all that is read, so a graph may hold this."""
        prepared = batch.attention = _Prepared()
        n, device = batch.num_decodes, batch.seq_lens.device
        if n == 0:
            return
        prepared.unit_starts = torch.empty(n, dtype=torch.int32, device=device)
        prepared.first_entries = torch.empty(self.num_programs, dtype=torch.int32, device=device)
        prepared.totals = torch.empty(2, dtype=torch.int32, device=device)
        prepared.arrivals = torch.zeros(n * self.num_kv_heads, dtype=torch.int32, device=device)
        _cut_kernel[(self.num_programs,)](
            batch.seq_lens, prepared.unit_starts, prepared.first_entries, prepared.totals, n, KV_HEADS=self.num_kv_heads,
            TILE=self.decode.kv_tile, LEAST=LEAST_UNITS, BLOCK=max(256, triton.next_power_of_2(n)), num_warps=4, **pdl(batch.seq_lens),
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch) -> Tensor:
        """q: [tokens, q_heads, head_dim]; k, v: [tokens, kv_heads, head_dim], already in the caches -> as q."""
        prepared: _Prepared = batch.attention
        q = q.contiguous()
        out = torch.empty_like(q)
        _, q_heads, head_dim = q.shape
        group = q_heads // self.num_kv_heads
        shape = dict(KV_HEADS=self.num_kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE=self.block_size,
                     PRECISION=self.precision, **pdl(q))  # fmt: skip
        if batch.num_decodes:
            if prepared.partials is None:
                places = (self.num_programs, 2, group)
                prepared.partials = (torch.empty(*places, head_dim, dtype=torch.float32, device=q.device),
                                     torch.empty(places, dtype=torch.float32, device=q.device),
                                     torch.empty(places, dtype=torch.float32, device=q.device))  # fmt: skip
            _decode_kernel[(self.num_programs,)](
                q, k_cache, v_cache, batch.block_tables, batch.seq_lens, prepared.unit_starts, prepared.first_entries,
                prepared.totals, out, *prepared.partials, prepared.arrivals, batch.block_tables.stride(0), self.scale_log2,
                ROWS=max(self.decode.rows, triton.next_power_of_2(group)), TILE=self.decode.kv_tile,
                STAGES=self.decode.stages, num_warps=self.decode.warps, **shape,
            )  # fmt: skip
        if batch.num_decodes < len(batch.host_query_lens):
            rows = max(self.prefill.rows, triton.next_power_of_2(group))
            if prepared.prefill_tiles is None:
                prepared.prefill_tiles = self._prefill_tiles(batch, rows // group)
            entries, tokens = prepared.prefill_tiles
            _prefill_kernel[(len(entries), self.num_kv_heads)](
                q, k_cache, v_cache, batch.block_tables, batch.seq_lens, batch.query_start_loc, entries, tokens, out,
                batch.block_tables.stride(0), self.scale_log2, ROWS=rows, TILE=self.prefill.kv_tile,
                STAGES=self.prefill.stages, num_warps=self.prefill.warps, **shape,
            )  # fmt: skip
        return out

    @staticmethod
    def _prefill_tiles(batch: ForwardBatch, tokens_per_tile: int) -> Tensor:
        """Entry and first query token of every query tile, the last tiles (the longest contexts) first."""
        tiles = [(entry, first)
                 for entry in range(batch.num_decodes, len(batch.host_query_lens))
                 for first in range(0, batch.host_query_lens[entry], tokens_per_tile)]  # fmt: skip
        tiles.reverse()
        pinned = batch.seq_lens.is_cuda  # a copy from pageable memory would wait for the device
        packed = torch.tensor(list(zip(*tiles, strict=True)), dtype=torch.int32, pin_memory=pinned)
        return packed.to(batch.seq_lens.device, non_blocking=True)
