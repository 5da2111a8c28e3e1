"""SwiGLU's gate (Shazeer, 2020) in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.launch import pdl, wait_for_inputs


@triton.jit
def gated(gate, up):
    """silu(gate) * up, rounded where the torch twin rounds: once after silu, and at the end."""
    x = gate.to(tl.float32)
    activated = (x / (1.0 + tl.exp(-x))).to(gate.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    wait_for_inputs(PDL)
    gate = tl.load(gate_up_ptr + token * 2 * n + columns, mask=inside)
    up = tl.load(gate_up_ptr + token * 2 * n + n + columns, mask=inside)
    tl.store(out_ptr + token * n + columns, gated(gate, up), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [tokens, 2 * n], gate first -> silu(gate) * up: [tokens, n]."""
    num_tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, n, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(n))
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(n, block))](
        gate_up.contiguous(), out, n, BLOCK=block, num_warps=4, **pdl(gate_up)
    )
    return out
