"""Matrix products of a few rows: what a decode step of a small batch spends its time on, bound by reading the weights.

cuBLAS reads them no slower, but a layer's four products take a few microseconds each, and between two of its kernels the
memory stands idle for as long. These kernels are part of the chain of dependent launches (launch.py): a program holds its
columns' weights in registers or shared memory before the kernel in front of it has ended, and then only waits for x.

    1 row          each thread multiplies and adds; one reduction over the program at the end
    2 to 16 rows   tensor cores; each warp has a slice of the reduction dimension

More rows, other shapes and other types go to cuBLAS, which is the faster one there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.launch import let_next_start, pdl, wait_for_inputs

_FEW_ROWS, _MOST_ROWS = 1, 16


@triton.jit
def _few_rows_kernel(x_ptr, weight_ptr, out_ptr, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
                     PARTS: tl.constexpr, PDL: tl.constexpr):
    """out[:, columns] for COLUMNS columns; the reduction dimension is PARTS parts of PART."""
    let_next_start(PDL)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ks = tl.arange(0, PART)
    weight_ptrs = weight_ptr + columns[:, None].to(tl.int64) * (PART * PARTS) + ks[None, :]
    weights = ()
    for part in tl.static_range(PARTS):
        weights = weights + (tl.load(weight_ptrs + part * PART),)  # type: ignore[assignment]
    wait_for_inputs(PDL)
    for row in tl.static_range(ROWS):
        products = tl.zeros([COLUMNS, PART], tl.float32)
        for part in tl.static_range(PARTS):
            x = tl.load(x_ptr + (row * PARTS + part) * PART + ks)
            products += weights[part].to(tl.float32) * x.to(tl.float32)[None, :]
        tl.store(out_ptr + row * n + columns, tl.sum(products, axis=1).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _some_rows_kernel(x_ptr, weight_ptr, out_ptr, num_rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr,
                      PART: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):
    """The same, transposed: weights times x. A part is SLICES slices, one a warp; their results are added at the end."""
    let_next_start(PDL)
    size: tl.constexpr = PART // SLICES
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slices = tl.arange(0, SLICES)[:, None, None] * size
    rows, ks = tl.arange(0, ROWS), tl.arange(0, size)
    weight_ptrs = weight_ptr + columns[None, :, None].to(tl.int64) * (PART * PARTS) + slices + ks[None, None, :]
    x_ptrs = x_ptr + rows[None, None, :] * (PART * PARTS) + slices + ks[None, :, None]
    exists = (rows < num_rows)[None, None, :]
    weights = ()
    for part in tl.static_range(PARTS):
        weights = weights + (tl.load(weight_ptrs + part * PART),)  # type: ignore[assignment]
    wait_for_inputs(PDL)
    acc = tl.zeros([SLICES, COLUMNS, ROWS], tl.float32)
    for part in tl.static_range(PARTS):
        acc = tl.dot(weights[part], tl.load(x_ptrs + part * PART, mask=exists, other=0.0), acc)
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[None, :] * n + columns[:, None], out, mask=(rows < num_rows)[None, :])


def _parts(k: int) -> int:
    """Into how many parts of 512 or 1,024, at most four, k is cut; 0 if it cannot be."""
    return next((parts for parts in (1, 2, 3, 4) if k in (512 * parts, 1024 * parts)), 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [rows, k], weight: [n, k], bias: [n] -> x W^T (+ b): [rows, n]."""
    (num_rows, k), n, parts = x.shape, weight.shape[0], _parts(x.shape[1])
    if not (0 < num_rows <= _MOST_ROWS and parts and n % 16 == 0 and x.dtype.itemsize == 2 and bias is None):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if num_rows <= _FEW_ROWS:
        columns, warps = (8, 2) if parts == 1 else (4, 4)
        _few_rows_kernel[(n // columns,)](x, weight, out, n, ROWS=num_rows, COLUMNS=columns, PART=k // parts, PARTS=parts,
                                          num_warps=warps, **pdl(x))  # fmt: skip
    else:
        rows = 8 if num_rows <= 8 else 16
        columns = 16 if parts <= 2 else 8  # 16 would be no faster in the chain, and too large for an RTX 4070
        _some_rows_kernel[(n // columns,)](x, weight, out, num_rows, n, ROWS=rows, COLUMNS=columns, SLICES=4, PART=k // parts,
                                           PARTS=parts, num_warps=4, **pdl(x))  # fmt: skip
    return out
