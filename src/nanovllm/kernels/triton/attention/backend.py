"""Attention over the paged KV cache: launches the kernels of decode.py, prefill.py and, where
shared prefixes are read once, shared.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.triton.attention.decode import cut_kernel, decode_kernel
from nanovllm.kernels.triton.attention.prefill import prefill_kernel, tiles_kernel
from nanovllm.kernels.triton.attention.shared import groups_kernel, shared_kernel, squads_kernel
from nanovllm.kernels.triton.launch import pdl, shared_memory

_LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 3  # programs of the decode kernel that are resident together


class Tiling(NamedTuple):
    """The tile sizes of a kernel: KV tokens per tile, warps and pipeline stages per program, rows
    of the query tile.
    """

    kv_tile: int
    warps: int
    stages: int
    rows: int


def tilings(dtype: torch.dtype, head_dim: int, shared_bytes: int) -> tuple[Tiling, Tiling]:
    """Tilings for decode and prefill. For heads of up to 128: the fastest on an H200, which also
    fit into the 99 KiB of an RTX 4070. For larger heads: the largest tiles that fit into a
    program's shared memory.
    """
    dims, most = triton.next_power_of_2(head_dim), 32 if dtype == torch.float32 else 64

    def bytes_of(kv_tile: int, rows: int) -> int:
        """Bytes of keys and values of two tiles in flight, queries, weights for the second matmul,
        and reductions.
        """
        return (2 * 2 * kv_tile * dims + rows * dims + rows * kv_tile) * dtype.itemsize + 2048

    def largest(most_rows: int) -> Tiling:
        sizes = [
            (kv_tile, rows)
            for kv_tile in (64, 32, 16)
            for rows in (64, 32, 16)
            if kv_tile <= most and rows <= most_rows
        ]
        kv_tile, rows = next((size for size in sizes if bytes_of(*size) <= shared_bytes), sizes[-1])
        # Looking up a tile's block takes stages as well: five stages keep two tiles in flight.
        return Tiling(kv_tile, warps=4, stages=5, rows=rows)

    return largest(16), largest(most)


@dataclass(slots=True)
class Shared:
    """Which prefixes are shared, and the state after attention over them; all int32 except the
    state.
    """

    tokens: Tensor  # [decodes]: tokens of its shared prefix
    order: Tensor  # [decodes]: group after group
    squad_starts: Tensor  # [squads]: in `order`
    squad_sizes: Tensor  # [squads]: entries, 0 where there is no squad
    # acc [decodes, q_heads, head_dim], top, mass [decodes, q_heads], float32
    state: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(slots=True)
class _Prepared:
    """Values shared by all layers of a step."""

    shared: Shared | None = None
    unit_starts: Tensor | None = None  # [decodes] int32: units of the entries before each
    first_entries: Tensor | None = None  # [programs] int32: the entry in which each piece begins
    totals: Tensor | None = None  # [2] int32: units a program, units in all
    arrivals: Tensor | None = None  # [decodes * kv_heads] int32: zero between launches
    # acc [programs, 2, group, head_dim], top, mass [programs, 2, group]
    partials: tuple[Tensor, Tensor, Tensor] | None = None
    prefill_tiles: Tensor | None = None  # [2, query tiles] int32: entry, its first query token


class TritonAttention:
    """The same interface as TorchAttention. Blocks hold a power of two of tokens, 16 or more;
    head_dim is 16 to 256.
    """

    def __init__(
        self,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        cascade: Counter[str] | None = None,
    ) -> None:
        """cascade: if given, shared prefixes are read once where `prepare` is told so, and counted
        there.
        """
        if not 16 <= head_dim <= 256:
            raise ValueError(
                f"head_dim={head_dim} cannot be used with attention_backend='triton': allowed is 16 to 256; "
                "take attention_backend='torch'"
            )
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(
                f"block_size={block_size} cannot be used with attention_backend='triton': "
                "take a power of two, 16 or more"
            )
        self.num_kv_heads, self.cascade = num_kv_heads, cascade
        self.block_size = block_size
        self.scale_log2 = head_dim**-0.5 * _LOG2_E
        # tf32 does not affect bfloat16
        self.precision = "ieee" if dtype == torch.float32 else "tf32"
        on_gpu = torch.cuda.is_available()
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4
        self.decode, self.prefill = tilings(dtype, head_dim, shared_memory(device))
        self.squad = 32  # entries whose queries are attended to a shared prefix together
        self.num_programs = num_sms * PROGRAMS_PER_SM

    def prepare(self, batch: ForwardBatch, share: bool = False) -> None:
        """Divides the decodes' work on the device, so that a graph can capture this. share: blocks
        of several decodes are read once.
        """
        prepared = batch.attention = _Prepared()
        n, device = batch.num_decodes, batch.seq_lens.device
        if n == 0:
            return
        if share and n > 1:
            prepared.shared = self._find_shared(batch)
        prepared.unit_starts = torch.empty(n, dtype=torch.int32, device=device)
        prepared.first_entries = torch.empty(self.num_programs, dtype=torch.int32, device=device)
        prepared.totals = torch.empty(2, dtype=torch.int32, device=device)
        prepared.arrivals = torch.zeros(n * self.num_kv_heads, dtype=torch.int32, device=device)
        cut_kernel[(self.num_programs,)](
            batch.seq_lens,
            prepared.shared.tokens if prepared.shared else batch.seq_lens,
            prepared.unit_starts,
            prepared.first_entries,
            prepared.totals,
            n,
            KV_HEADS=self.num_kv_heads,
            TILE=self.decode.kv_tile,
            BLOCK=max(256, triton.next_power_of_2(n)),
            SHARED=prepared.shared is not None,
            num_warps=4,
            **pdl(batch.seq_lens),
        )

    def _find_shared(self, batch: ForwardBatch) -> Shared:
        """Finds shared prefixes on the device, from the block tables, so that a graph can capture
        this.
        """
        n, tables = batch.num_decodes, batch.block_tables
        # Each begins at a multiple of 16 bytes; otherwise Triton would compile the kernels again.
        leaders, ranks, sizes, pages, tokens, order = torch.empty(
            6, -(-n // 4) * 4, dtype=torch.int32, device=tables.device
        )[:, :n]
        squad_starts, squad_sizes = torch.empty(
            2, -(-n // 8) * 4, dtype=torch.int32, device=tables.device
        )[:, : n // 2]
        block = max(256, triton.next_power_of_2(n))
        groups_kernel[(n,)](
            tables,
            batch.seq_lens,
            leaders,
            ranks,
            sizes,
            pages,
            tables.stride(0),
            n,
            PAGE=self.block_size,
            BLOCK=block,
            PAGES=128,
            num_warps=4,
            **pdl(tables),
        )
        squads_kernel[(n,)](
            leaders,
            ranks,
            sizes,
            pages,
            tokens,
            order,
            squad_starts,
            squad_sizes,
            n,
            n // 2,
            MEMBERS=self.squad,
            PAGE=self.block_size,
            BLOCK=block,
            num_warps=4,
            **pdl(tables),
        )
        return Shared(tokens, order, squad_starts, squad_sizes)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """q: [tokens, q_heads, head_dim]; k, v: [tokens, kv_heads, head_dim], already in the caches
        -> as q.
        """
        prepared: _Prepared = batch.attention
        q = q.contiguous()
        out = torch.empty_like(q)
        _, q_heads, head_dim = q.shape
        group = q_heads // self.num_kv_heads
        shape: dict[str, Any] = dict(
            KV_HEADS=self.num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE=self.block_size,
            PRECISION=self.precision,
            **pdl(q),
        )
        if batch.num_decodes:
            if prepared.partials is None:
                places = (self.num_programs, 2, group)
                prepared.partials = (
                    torch.empty(*places, head_dim, dtype=torch.float32, device=q.device),
                    torch.empty(places, dtype=torch.float32, device=q.device),
                    torch.empty(places, dtype=torch.float32, device=q.device),
                )
            of_shared: tuple[Tensor, ...] = (batch.seq_lens, q, q, q)  # not read
            if shared := prepared.shared:
                if self.cascade is not None:
                    self.cascade["shared"] += 1
                of_shared = (
                    shared.tokens,
                    *self._attend_to_shared(q, k_cache, v_cache, batch, shared, shape),
                )
            decode_kernel[(self.num_programs,)](
                q,
                k_cache,
                v_cache,
                batch.block_tables,
                batch.seq_lens,
                *of_shared,
                prepared.unit_starts,
                prepared.first_entries,
                prepared.totals,
                out,
                *prepared.partials,
                prepared.arrivals,
                batch.block_tables.stride(0),
                self.scale_log2,
                ROWS=max(self.decode.rows, triton.next_power_of_2(group)),
                TILE=self.decode.kv_tile,
                STAGES=self.decode.stages,
                SHARED=bool(shared),
                num_warps=self.decode.warps,
                **shape,
            )
        if batch.num_decodes < len(batch.host_query_lens):
            rows = max(self.prefill.rows, triton.next_power_of_2(group))
            if prepared.prefill_tiles is None:
                prepared.prefill_tiles = _prefill_tiles(batch, rows // group)
            entries, tokens = prepared.prefill_tiles
            prefill_kernel[(len(entries), self.num_kv_heads)](
                q,
                k_cache,
                v_cache,
                batch.block_tables,
                batch.seq_lens,
                batch.query_start_loc,
                entries,
                tokens,
                out,
                batch.block_tables.stride(0),
                self.scale_log2,
                ROWS=rows,
                TILE=self.prefill.kv_tile,
                STAGES=self.prefill.stages,
                num_warps=self.prefill.warps,
                **shape,
            )
        return out

    def _attend_to_shared(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: ForwardBatch,
        shared: Shared,
        shape: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state of each decode after its shared tokens."""
        if shared.state is None:
            n, (_, q_heads, head_dim) = batch.num_decodes, q.shape
            shared.state = (
                torch.empty(n, q_heads, head_dim, dtype=torch.float32, device=q.device),
                torch.empty(n, q_heads, dtype=torch.float32, device=q.device),
                torch.empty(n, q_heads, dtype=torch.float32, device=q.device),
            )
        num_squads = len(shared.squad_sizes)
        rows = max(self.prefill.rows, triton.next_power_of_2(shape["GROUP"]))
        parts = triton.cdiv(self.squad, rows // shape["GROUP"])
        at_once = max(1, min(num_squads, self.num_programs // (self.num_kv_heads * parts)))
        shared_kernel[(self.num_kv_heads, parts, at_once)](
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            shared.tokens,
            shared.order,
            shared.squad_starts,
            shared.squad_sizes,
            *shared.state,
            num_squads,
            batch.block_tables.stride(0),
            self.scale_log2,
            ROWS=rows,
            TILE=self.prefill.kv_tile,
            STAGES=self.prefill.stages,
            num_warps=self.prefill.warps,
            **shape,
        )
        return shared.state


def _prefill_tiles(batch: ForwardBatch, tokens_per_tile: int) -> Tensor:
    """[2, tiles] int32: entry and first query token of every query tile, found on the device, so
    that a graph can capture this. The host's lengths only bound their number.
    """
    first, lengths = batch.num_decodes, batch.host_query_lens[batch.num_decodes :]
    num_tiles = sum(-(-length // tokens_per_tile) for length in lengths)
    tiles = torch.empty(2, num_tiles, dtype=torch.int32, device=batch.seq_lens.device)
    tiles_kernel[(num_tiles,)](
        batch.query_start_loc,
        *tiles,
        first,
        first + len(lengths),
        TOKENS=tokens_per_tile,
        BLOCK=max(16, triton.next_power_of_2(len(lengths))),
        num_warps=1,
        **pdl(tiles),
    )
    return tiles
