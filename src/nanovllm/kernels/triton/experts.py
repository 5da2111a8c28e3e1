"""A mixture of experts in two grouped matmuls: gate and up with SwiGLU, then down.

The pairs (token, chosen expert) are sorted by expert, so that the rows of an expert lie side by side and share
its weights. A program computes ROWS rows of one expert and COLUMNS outputs; which expert, it finds in the
running numbers of tiles. The grid has as many row tiles as there can be, whatever the router chose: nothing is read
on the host, and the launches can be captured. A pair's result is stored in its own row, and the rows of a
token are added in the order of its choices, so that the same token has the same result in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.activation import gated
from nanovllm.kernels.triton.launch import pdl, wait_for_inputs

_COLUMNS, _STEP = 64, 64
_MANY_PAIRS = 16
"""From this many pairs an expert on, tiles have 64 rows; below, 16, as most experts have few rows in a decode step."""


@triton.jit
def _grouped_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    order_ptr,
    shares_ptr,
    pair_ends_ptr,
    tile_ends_ptr,
    n,
    k,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """GATED: out[pair, columns] = silu(gate) * up of token pair // TOP_K, of n columns each. Otherwise
    out[pair, columns] = share of the pair * (x[pair] times the expert's weights).
    """
    tile = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS_BLOCK)
    wait_for_inputs(PDL)
    tile_ends = tl.load(tile_ends_ptr + numbers, mask=numbers < NUM_EXPERTS, other=2147483647)
    pair_ends = tl.load(pair_ends_ptr + numbers, mask=numbers < NUM_EXPERTS, other=0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32))
    if expert < NUM_EXPERTS:
        before = numbers < expert
        first_tile = tl.max(tl.where(before, tile_ends, 0))
        first_pair = tl.max(tl.where(before, pair_ends, 0))
        end = tl.load(pair_ends_ptr + expert)
        places = first_pair + (tile - first_tile) * ROWS + tl.arange(0, ROWS)
        exists = (places < end)[:, None]
        pairs = tl.load(order_ptr + places, mask=places < end, other=0)
        rows = pairs
        if GATED:
            rows = pairs // TOP_K
        members = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        columns = members
        outputs = n
        if GATED:  # gate and up of a column side by side
            columns = members // 2 + members % 2 * n
            outputs = 2 * n
        inside = members < outputs
        ks = tl.arange(0, STEP)[None, :]
        x_rows = x_ptr + rows[:, None].to(tl.int64) * k + ks
        weight_rows = (
            weight_ptr + expert.to(tl.int64) * outputs * k + columns[:, None].to(tl.int64) * k + ks
        )
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, k, STEP):
            left = ks < k - at
            x = tl.load(x_rows + at, mask=exists & left, other=0.0)
            weights = tl.load(weight_rows + at, mask=inside[:, None] & left, other=0.0)
            acc = tl.dot(x, tl.trans(weights), acc, input_precision="ieee")
        results = acc.to(out_ptr.dtype.element_ty)
        out_rows = out_ptr + pairs[:, None].to(tl.int64) * n
        if GATED:
            gate, up = tl.split(tl.reshape(results, (ROWS, COLUMNS // 2, 2)))
            half = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
            tl.store(out_rows + half, gated(gate, up), mask=exists & (half < n))
        else:
            shares = tl.load(shares_ptr + pairs, mask=places < end, other=0.0)[:, None]
            results = (results.to(tl.float32) * shares.to(tl.float32)).to(results.dtype)
            tl.store(out_rows + columns[None, :], results, mask=exists & inside[None, :])


def mix_experts(
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    some_elsewhere: bool = False,
) -> Tensor:
    """x: [tokens, hidden]; shares, chosen: [tokens, top_k]; gate_up: [experts, 2 * size, hidden], gate
    first; down: [experts, hidden, size] -> [tokens, hidden]. some_elsewhere: pairs whose number is above the last
    expert are another rank's. They are sorted behind all others, no tile computes them, and they add 0.
    """
    (num_tokens, hidden), top_k, num_experts = x.shape, chosen.shape[1], gate_up.shape[0]
    num_pairs, size = num_tokens * top_k, down.shape[2]
    of_pairs = chosen.flatten()
    order = of_pairs.argsort(stable=True)
    every = torch.arange(num_experts, device=x.device)
    counts = (of_pairs[None, :] == every[:, None]).sum(1)
    rows = 64 if num_pairs >= _MANY_PAIRS * num_experts else 16
    pair_ends = counts.cumsum(0).int()
    tile_ends = ((counts + rows - 1) // rows).cumsum(0).int()
    tiles = min(num_pairs, triton.cdiv(num_pairs, rows) + num_experts)

    inner = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    make = torch.zeros if some_elsewhere else torch.empty
    results = make(num_pairs, hidden, dtype=x.dtype, device=x.device)
    for source, weight, out, gate_and_up in (
        (x.contiguous(), gate_up, inner, True),
        (inner, down, results, False),
    ):
        n = out.shape[1]
        _grouped_kernel[(tiles, triton.cdiv(2 * n if gate_and_up else n, _COLUMNS))](
            source,
            weight,
            out,
            order,
            shares.contiguous(),
            pair_ends,
            tile_ends,
            n,
            source.shape[1],
            NUM_EXPERTS=num_experts,
            EXPERTS_BLOCK=triton.next_power_of_2(num_experts),
            TOP_K=top_k,
            ROWS=rows,
            COLUMNS=_COLUMNS,
            STEP=_STEP,
            GATED=gate_and_up,
            num_warps=4,
            **pdl(x),
        )
    return results.view(num_tokens, top_k, hidden).sum(1)
