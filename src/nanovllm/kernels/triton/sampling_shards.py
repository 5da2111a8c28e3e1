"""Sampling where each rank holds the logits of a part of the vocabulary. Gives the bits of
kernels/torch/sampling_shards.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.launch import pdl, wait_for_inputs
from nanovllm.kernels.triton.sampling import best_of_slices


@triton.jit(do_not_specialize=["num_rows", "num_slices", "num_parts"])
def _best_of_shards_kernel(
    gathered_ptr, out_ptr, num_rows, num_slices, num_parts, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < num_parts * num_slices
    place = (
        (index // num_slices) * (2 * num_rows * num_slices) + row * num_slices + index % num_slices
    )
    wait_for_inputs(PDL)
    values = tl.load(gathered_ptr + place, mask=inside, other=0).to(tl.float32, bitcast=True)
    values = tl.where(inside, values, float("-inf"))
    tokens = tl.load(gathered_ptr + num_rows * num_slices + place, mask=inside, other=0x7FFFFFFF)
    tl.store(
        out_ptr + row,
        tl.min(tl.where(values == tl.max(values, axis=0), tokens, 0x7FFFFFFF), axis=0).to(tl.int64),
    )


def best_of_shard(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_token: int,
    *,
    all_greedy: bool,
) -> Tensor:
    """Like the torch twin, with several slices per part: [2, n, slices] int32."""
    return best_of_slices(logits, temperatures, seeds, positions, first_token)


def best_of_shards(gathered: Tensor) -> Tensor:
    """gathered: [parts, 2, n, slices] int32 -> token ids: [n] int64, the lowest in a tie."""
    parts, _, n, slices = gathered.shape
    out = torch.empty(n, dtype=torch.int64, device=gathered.device)
    _best_of_shards_kernel[(n,)](
        gathered,
        out,
        n,
        slices,
        parts,
        BLOCK=triton.next_power_of_2(parts * slices),
        num_warps=1,
        **pdl(gathered),
    )
    return out
