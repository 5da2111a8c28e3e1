"""Attention over the paged KV cache: the backend that launches attention_decode.py and attention_prefill.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.triton.attention_decode import cut_kernel, decode_kernel
from nanovllm.kernels.triton.attention_prefill import prefill_kernel, tiles_kernel
from nanovllm.kernels.triton.launch import pdl

_LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 3  # of the decode kernel, resident together


class Tiling(NamedTuple):
    """How a kernel is cut: KV tokens a tile, warps and pipeline stages a program, rows of the query tile."""

    kv_tile: int
    warps: int
    stages: int
    rows: int


def tilings(dtype: torch.dtype) -> tuple[Tiling, Tiling]:
    """For decode and prefill: what was fastest on an H200, and fits into the 99 KiB of an RTX 4070."""
    # Looking up a tile's page takes stages as well: five are two tiles in flight.
    decode, prefill = Tiling(kv_tile=64, warps=4, stages=5, rows=16), Tiling(kv_tile=64, warps=4, stages=5, rows=64)
    if dtype == torch.float32:
        decode, prefill = decode._replace(kv_tile=32), prefill._replace(kv_tile=32, rows=prefill.rows // 2)
    return decode, prefill


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
            raise ValueError(f"block_size={block_size} cannot be used with attention_backend='triton': "
                             "take a power of two, 16 or more")
        self.num_kv_heads = num_kv_heads
        self.block_size = block_size
        self.scale_log2 = scale * _LOG2_E
        self.precision = "ieee" if dtype == torch.float32 else "tf32"  # tf32 says nothing of bfloat16
        num_sms = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 4
        self.decode, self.prefill = tilings(dtype)
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
        cut_kernel[(self.num_programs,)](
            batch.seq_lens, prepared.unit_starts, prepared.first_entries, prepared.totals, n, KV_HEADS=self.num_kv_heads,
            TILE=self.decode.kv_tile, BLOCK=max(256, triton.next_power_of_2(n)), num_warps=4, **pdl(batch.seq_lens),
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
            decode_kernel[(self.num_programs,)](
                q, k_cache, v_cache, batch.block_tables, batch.seq_lens, prepared.unit_starts, prepared.first_entries,
                prepared.totals, out, *prepared.partials, prepared.arrivals, batch.block_tables.stride(0), self.scale_log2,
                ROWS=max(self.decode.rows, triton.next_power_of_2(group)), TILE=self.decode.kv_tile,
                STAGES=self.decode.stages, num_warps=self.decode.warps, **shape,
            )  # fmt: skip
        if batch.num_decodes < len(batch.host_query_lens):
            rows = max(self.prefill.rows, triton.next_power_of_2(group))
            if prepared.prefill_tiles is None:
                prepared.prefill_tiles = _prefill_tiles(batch, rows // group)
            entries, tokens = prepared.prefill_tiles
            prefill_kernel[(len(entries), self.num_kv_heads)](
                q, k_cache, v_cache, batch.block_tables, batch.seq_lens, batch.query_start_loc, entries, tokens, out,
                batch.block_tables.stride(0), self.scale_log2, ROWS=rows, TILE=self.prefill.kv_tile,
                STAGES=self.prefill.stages, num_warps=self.prefill.warps, **shape,
            )  # fmt: skip
        return out


def _prefill_tiles(batch: ForwardBatch, tokens_per_tile: int) -> Tensor:
    """[2, tiles] int32: entry and first query token of every query tile, found on the device, so that a graph may hold this.
    The host's lengths only bound their number."""
    first, lengths = batch.num_decodes, batch.host_query_lens[batch.num_decodes :]
    num_tiles = sum(-(-length // tokens_per_tile) for length in lengths)
    tiles = torch.empty(2, num_tiles, dtype=torch.int32, device=batch.seq_lens.device)
    tiles_kernel[(num_tiles,)](
        batch.query_start_loc, *tiles, first, first + len(lengths), TOKENS=tokens_per_tile,
        BLOCK=max(16, triton.next_power_of_2(len(lengths))), num_warps=1, **pdl(tiles),
    )  # fmt: skip
    return tiles
