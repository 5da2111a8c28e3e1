"""RMSNorm (Zhang and Sennrich, 2019), alone or after the residual sum, in one pass. Rounds where
the torch twin rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.launch import pdl, wait_for_inputs, warps_for


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    n,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * n
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    weight = tl.load(weight_ptr + columns, mask=inside)
    wait_for_inputs(PDL)
    total = tl.load(x_ptr + row + columns, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row + columns, mask=inside, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(total.dtype)
        tl.store(total_ptr + row + columns, total, mask=inside)
    x = total.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x) / n + eps)).to(total.dtype)
    tl.store(
        out_ptr + row + columns,
        (normed.to(tl.float32) * weight.to(tl.float32)).to(total.dtype),
        mask=inside,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., n], weight: [n] -> [..., n] in x's dtype, a new tensor."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual), both new: neither input is written to."""
    return _launch(x, residual.contiguous(), weight, eps)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    n = x.shape[-1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(x.numel() // n,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        n,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=warps_for(block),
        **pdl(x),
    )
    return out, total
