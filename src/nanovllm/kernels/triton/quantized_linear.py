"""Matmuls of up to 64 rows with quantized weights, which read half or a quarter of a matmul's bytes.

A program computes a few columns: it reads their stored weights once, turns them into x's dtype in registers, and multiplies on
tensor cores. Scales of whole columns are applied to the sums, those of groups to the sum of each group, in float32. In W8A8 both
sides are e4m3 and need no conversion (sm_89 and later).

More rows are bound by arithmetic: the callers dequantize the weight and leave the product to cuBLAS (quantization/triton.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.launch import let_next_start, pdl, wait_for_inputs

MOST_ROWS = 64
_GROUP = tl.constexpr(128)
_STEP = 128  # of the reduction dimension per iteration


@triton.jit(do_not_specialize=["num_rows"])
def scaled_kernel(
    x_ptr,
    x_scales_ptr,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    n,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[:, columns] = x packed^T * scales (* x_scales, where x is quantized as well) (+ bias), for COLUMNS columns."""
    let_next_start(PDL)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists, inside = rows < num_rows, columns < n
    packed_rows = packed_ptr + columns[:, None].to(tl.int64) * k
    scales = tl.load(scales_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, k, STEP):
        ks = at + tl.arange(0, STEP)
        within = (ks < k)[None, :]
        weights = tl.load(packed_rows + ks[None, :], mask=inside[:, None] & within, other=0.0)
        x = tl.load(
            x_ptr + rows[:, None] * k + ks[None, :], mask=exists[:, None] & within, other=0.0
        )
        acc = tl.dot(x, tl.trans(weights.to(x.dtype)), acc, input_precision=PRECISION)
    out = acc * scales[None, :]
    if x_scales_ptr is not None:
        out *= tl.load(x_scales_ptr + rows, mask=exists, other=0.0)[:, None]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * n + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def int4_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    n,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[:, columns] = sum over groups of (x (packed - zero)^T) * scale (+ bias), for COLUMNS columns."""
    let_next_start(PDL)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists, inside = rows < num_rows, columns < n
    half, groups = k // 2, tl.cdiv(k, _GROUP)
    packed_rows = packed_ptr + columns[:, None].to(tl.int64) * half
    first_groups = columns * groups
    wait_for_inputs(PDL)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for group in range(groups):
        places = group * (_GROUP // 2) + tl.arange(0, _GROUP // 2)
        packed = tl.load(
            packed_rows + places[None, :],
            mask=inside[:, None] & (places < half)[None, :],
            other=0,
        )
        zeros = tl.load(zeros_ptr + first_groups + group, mask=inside, other=0).to(tl.int8)
        scales = tl.load(scales_ptr + first_groups + group, mask=inside, other=0.0).to(tl.float32)
        ks = group * _GROUP + tl.arange(0, _GROUP)
        x = tl.load(
            x_ptr + rows[:, None] * k + ks[None, :],
            mask=exists[:, None] & (ks < k)[None, :],
            other=0.0,
        )
        even, odd = tl.split(tl.reshape(x, (ROWS, _GROUP // 2, 2)))
        low = ((packed & 15).to(tl.int8) - zeros[:, None]).to(x.dtype)
        high = ((packed >> 4).to(tl.int8) - zeros[:, None]).to(x.dtype)
        sums = tl.dot(even, tl.trans(low), input_precision=PRECISION)
        sums = tl.dot(odd, tl.trans(high), sums, input_precision=PRECISION)
        acc += sums * scales[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * n + columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & inside[None, :],
    )


def int8_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [rows, k], at most MOST_ROWS of them; packed: int8 [n, k]; scales: [n, 1] -> [rows, n] in x's dtype."""
    return _scaled(x, None, packed, scales, bias, x.dtype)


def fp8_linear(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x: e4m3 [rows, k], at most MOST_ROWS of them; x_scales: float32 [rows, 1]; packed: e4m3 [n, k]; scales: float32 [n, 1]
    -> [rows, n] in `dtype`.
    """
    return _scaled(x, x_scales, packed, scales, bias, dtype)


def int4_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x: [rows, k], at most MOST_ROWS of them; packed: uint8 [n, k / 2], an even input in the low four bits; scales, zeros
    (uint8): [n, groups of 128 inputs, the last of which may be shorter] -> [rows, n] in x's dtype.
    """
    (num_rows, k), n = x.shape, len(packed)
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    columns = _columns(n)
    int4_kernel[(triton.cdiv(n, columns),)](
        x.contiguous(),
        packed,
        scales,
        zeros,
        bias,
        out,
        num_rows,
        n,
        k,
        ROWS=_rows(num_rows),
        COLUMNS=columns,
        PRECISION=_precision(x.dtype),
        num_warps=4,
        num_stages=_stages(x.dtype),
        **pdl(x),
    )
    return out


def _scaled(
    x: Tensor,
    x_scales: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    (num_rows, k), n = x.shape, len(packed)
    out = torch.empty(num_rows, n, dtype=dtype, device=x.device)
    columns = _columns(n)
    scaled_kernel[(triton.cdiv(n, columns),)](
        x.contiguous(),
        x_scales,
        packed,
        scales,
        bias,
        out,
        num_rows,
        n,
        k,
        ROWS=_rows(num_rows),
        COLUMNS=columns,
        STEP=_STEP,
        PRECISION=_precision(x.dtype),
        num_warps=4,
        num_stages=_stages(x.dtype),
        **pdl(x),
    )
    return out


def _rows(num_rows: int) -> int:
    """Rows of the tile: tensor cores take 16 at least."""
    return max(16, triton.next_power_of_2(num_rows))


def _columns(n: int) -> int:
    """Columns of a program: few enough that all multiprocessors have some."""
    return 32 if n >= 4096 else 16


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # tf32 does not affect smaller types


def _stages(dtype: torch.dtype) -> int:
    """Tiles in flight: three of float32 would not fit into the shared memory of an RTX 4070."""
    return 2 if dtype == torch.float32 else 3
