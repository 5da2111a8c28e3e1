"""Gathers inputs and advances state in a captured decode step. Loaded with CUDA graphs."""

from typing import NamedTuple

from torch import Tensor


class DecodeInputs(NamedTuple):
    """Inputs of a decode step, one entry per row."""

    token_ids: Tensor  # [entries] int64: each row's last token
    slot_mapping: Tensor  # [entries] int64
    block_tables: Tensor  # [entries, max_blocks] int32
    # [entries] int32: tokens of the sequence after this step; 0 where the last row of all pads the
    # batch
    seq_lens: Tensor
    next_positions: Tensor  # [entries] int64: of the tokens that will be sampled
    temperatures: Tensor  # [entries] float32
    seeds: Tensor  # [entries] int64


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
    tables = block_tables[rows]
    blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
    real = rows < last_tokens.shape[0] - 1
    return DecodeInputs(
        last_tokens[rows],
        blocks * block_size + positions % block_size,
        tables,
        ((positions + 1) * real).int(),
        positions + 1,
        temperatures[rows],
        seeds[rows],
    )


def advance_rows(rows: Tensor, positions: Tensor, last_tokens: Tensor, token_ids: Tensor) -> None:
    """Stores the sampled tokens and advances positions by one, except in the last row of the state,
    which pads batches.
    """
    last_tokens[rows] = token_ids
    positions += (rows < last_tokens.shape[0] - 1).long()


def write_blocks(block_tables: Tensor, updates: Tensor) -> None:
    """updates: [n, 3] int64, each (row, column, block to write there); no place occurs twice."""
    rows, columns, blocks = updates.unbind(1)
    block_tables[rows, columns] = blocks.int()
