"""Gathers inputs and advances state in a captured decode step, one kernel each where the torch twin
launches a dozen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.torch.decode_step import DecodeInputs
from nanovllm.kernels.triton.launch import pdl, wait_for_inputs


@triton.jit(do_not_specialize=["spare_row"])
def _gather_kernel(
    rows_ptr,
    positions_ptr,
    tables_ptr,
    last_tokens_ptr,
    temperatures_ptr,
    all_seeds_ptr,
    tokens_ptr,
    slots_ptr,
    out_tables_ptr,
    seq_lens_ptr,
    next_positions_ptr,
    out_temperatures_ptr,
    seeds_ptr,
    width,
    spare_row,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    row = tl.load(rows_ptr + entry)
    position = tl.load(positions_ptr + entry)
    block = tl.load(tables_ptr + row * width + position // PAGE).to(tl.int64)
    tl.store(tokens_ptr + entry, tl.load(last_tokens_ptr + row))
    tl.store(slots_ptr + entry, block * PAGE + position % PAGE)
    tl.store(seq_lens_ptr + entry, tl.where(row < spare_row, position + 1, 0).to(tl.int32))
    tl.store(next_positions_ptr + entry, position + 1)
    tl.store(out_temperatures_ptr + entry, tl.load(temperatures_ptr + row))
    tl.store(seeds_ptr + entry, tl.load(all_seeds_ptr + row))
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        blocks = tl.load(tables_ptr + row * width + columns, mask=columns < width)
        tl.store(out_tables_ptr + entry * width + columns, blocks, mask=columns < width)


@triton.jit(do_not_specialize=["num_entries", "spare_row"])
def _advance_kernel(
    rows_ptr,
    positions_ptr,
    last_tokens_ptr,
    tokens_ptr,
    num_entries,
    spare_row,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < num_entries
    wait_for_inputs(PDL)
    rows = tl.load(rows_ptr + entries, mask=inside)
    positions = tl.load(positions_ptr + entries, mask=inside)
    tl.store(last_tokens_ptr + rows, tl.load(tokens_ptr + entries, mask=inside), mask=inside)
    tl.store(positions_ptr + entries, positions + (rows < spare_row).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["num_updates", "width"])
def _write_blocks_kernel(
    tables_ptr, updates_ptr, num_updates, width, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    updates = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = updates < num_updates
    wait_for_inputs(PDL)
    rows = tl.load(updates_ptr + 3 * updates, mask=inside)
    columns = tl.load(updates_ptr + 3 * updates + 1, mask=inside)
    tl.store(
        tables_ptr + rows * width + columns,
        tl.load(updates_ptr + 3 * updates + 2, mask=inside).to(tl.int32),
        mask=inside,
    )


def gather_decode_inputs(
    rows: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    last_tokens: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    block_size: int,
) -> DecodeInputs:
    """rows, positions: [entries] int64, positions those of the last tokens; the others: the state
    of all rows.
    """
    n, width = rows.shape[0], block_tables.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=rows.device)

    out = DecodeInputs(
        empty(n),
        empty(n),
        empty(n, width, dtype=torch.int32),
        empty(n, dtype=torch.int32),
        empty(n),
        empty(n, dtype=torch.float32),
        empty(n),
    )
    _gather_kernel[(n,)](
        rows,
        positions,
        block_tables,
        last_tokens,
        temperatures,
        seeds,
        out.token_ids,
        out.slot_mapping,
        out.block_tables,
        out.seq_lens,
        out.next_positions,
        out.temperatures,
        out.seeds,
        width,
        last_tokens.shape[0] - 1,
        PAGE=block_size,
        BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=1,
        **pdl(rows),
    )
    return out


def advance_rows(rows: Tensor, positions: Tensor, last_tokens: Tensor, token_ids: Tensor) -> None:
    """Stores the sampled tokens and advances positions by one, except in the last row of the state,
    which pads batches.
    """
    n = rows.shape[0]
    _advance_kernel[(triton.cdiv(n, 128),)](
        rows,
        positions,
        last_tokens,
        token_ids,
        n,
        last_tokens.shape[0] - 1,
        BLOCK=128,
        num_warps=1,
        **pdl(rows),
    )


def write_blocks(block_tables: Tensor, updates: Tensor) -> None:
    """updates: [n, 3] int64, each (row, column, block to write there); no place occurs twice."""
    n = updates.shape[0]
    _write_blocks_kernel[(triton.cdiv(n, 128),)](
        block_tables, updates, n, block_tables.shape[1], BLOCK=128, num_warps=1, **pdl(block_tables)
    )
