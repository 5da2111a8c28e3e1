"""Matmuls of a few rows, which dominate a decode step of a small batch and are bound by reading
the weights.

cuBLAS reads them as fast, but a layer's four matmuls take a few microseconds each, and between two
of its kernels the memory is idle for as long. These kernels are part of the chain of dependent
launches (launch.py): a program has its columns' weights in registers or shared memory before the
kernel in front of it has ended, and then only waits for x.

    1 row           each thread multiplies and adds; one reduction over the program at the end
    2 to 16 rows    tensor cores; each warp has a slice of the reduction dimension
    17 to 64 rows   tensor cores; where there are few columns, several programs share the reduction dimension (split-K), and
                    the last one to finish adds up their parts, in order

More rows, other shapes and other types go to cuBLAS, which is faster there. The kernels of up to 16
rows can end in SwiGLU (fused.py).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.activation import gated
from nanovllm.kernels.triton.launch import (
    let_next_start,
    pdl,
    prefetch_to_l2,
    shared_memory,
    wait_for_inputs,
)

_FEW_ROWS, _SOME_ROWS, _TILE_ROWS = 1, 16, 64
_STEP = 128  # of the reduction dimension per iteration of _tile_kernel
_LARGE = 1 << 23
"""Beyond _SOME_ROWS, matmuls with this many weights are left to cuBLAS: _tile_kernel was measured
at Qwen3-0.6B's shapes, all of them smaller, and a large matmul fills the GPU by itself.
"""


@triton.jit
def _weight_rows(columns, n, GATED: tl.constexpr):
    """The weights of a program's columns. GATED: column 2 c is column c of gate, 2 c + 1 that of
    up; gate has n rows of weights, followed by up's.
    """
    if GATED:
        return (columns // 2 + columns % 2 * n).to(tl.int64)
    return columns.to(tl.int64)


@triton.jit
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[:, columns] for COLUMNS columns; the reduction dimension is split into PARTS parts of
    PART. GATED: silu(gate) * up of pairs.
    """
    let_next_start(PDL)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ks = tl.arange(0, PART)
    weight_ptrs = (
        weight_ptr + _weight_rows(columns, n, GATED)[:, None] * (PART * PARTS) + ks[None, :]
    )
    weights = ()
    for part in tl.static_range(PARTS):
        weights = weights + (tl.load(weight_ptrs + part * PART),)  # type: ignore[assignment]
    if bias_ptr is not None:
        biases = tl.load(bias_ptr + columns).to(tl.float32)
    wait_for_inputs(PDL)
    for row in tl.static_range(ROWS):
        products = tl.zeros([COLUMNS, PART], tl.float32)
        for part in tl.static_range(PARTS):
            x = tl.load(x_ptr + (row * PARTS + part) * PART + ks)
            products += weights[part].to(tl.float32) * x.to(tl.float32)[None, :]
        sums = tl.sum(products, axis=1)
        if bias_ptr is not None:
            sums += biases
        out = sums.to(out_ptr.dtype.element_ty)
        if GATED:
            gate, up = tl.split(tl.reshape(out, (COLUMNS // 2, 2)))
            pairs = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            tl.store(out_ptr + row * n + pairs, gated(gate, up))
        else:
            tl.store(out_ptr + row * n + columns, out)


@triton.jit(do_not_specialize=["num_rows"])
def _some_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same, transposed: weights times x. A part has SLICES slices, one per warp; their results
    are added at the end.
    """
    let_next_start(PDL)
    size: tl.constexpr = PART // SLICES
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slices = tl.arange(0, SLICES)[:, None, None] * size
    rows, ks = tl.arange(0, ROWS), tl.arange(0, size)
    weight_ptrs = (
        weight_ptr
        + _weight_rows(columns, n, GATED)[None, :, None] * (PART * PARTS)
        + slices
        + ks[None, None, :]
    )
    x_ptrs = x_ptr + rows[None, None, :] * (PART * PARTS) + slices + ks[None, :, None]
    exists = (rows < num_rows)[None, None, :]
    weights = ()
    for part in tl.static_range(PARTS):
        weights = weights + (tl.load(weight_ptrs + part * PART),)  # type: ignore[assignment]
    if bias_ptr is not None:
        biases = tl.load(bias_ptr + columns).to(tl.float32)
    wait_for_inputs(PDL)
    acc = tl.zeros([SLICES, COLUMNS, ROWS], tl.float32)
    for part in tl.static_range(PARTS):
        acc = tl.dot(weights[part], tl.load(x_ptrs + part * PART, mask=exists, other=0.0), acc)
    sums = tl.sum(acc, axis=0)
    if bias_ptr is not None:
        sums += biases[:, None]
    out = sums.to(out_ptr.dtype.element_ty)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(out, (COLUMNS // 2, 2, ROWS)), (0, 2, 1)))
        pairs = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        tl.store(
            out_ptr + rows[None, :] * n + pairs[:, None],
            gated(gate, up),
            mask=(rows < num_rows)[None, :],
        )
    else:
        tl.store(
            out_ptr + rows[None, :] * n + columns[:, None], out, mask=(rows < num_rows)[None, :]
        )


@triton.jit(do_not_specialize=["num_rows"])
def _tile_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    num_rows,
    n,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[:, columns] for COLUMNS columns, over part number program_id(1) of the reduction
    dimension, PART long.

    parts: [SPLITS, num_rows, n] float32. arrivals: an integer for each group of columns, zero
    between launches.
    """
    let_next_start(PDL)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    weight_rows = weight_ptr + columns[:, None].to(tl.int64) * k + split * PART
    # prefetch the weights into L2 while the kernel in front still runs
    if PDL:
        for at in tl.static_range(0, PART, STEP):
            # lines of 128 bytes
            prefetch_to_l2(weight_rows + at + (tl.arange(0, STEP // 64) * 64)[None, :])
    if bias_ptr is not None:
        biases = tl.load(bias_ptr + columns).to(tl.float32)
    wait_for_inputs(PDL)
    ks = tl.arange(0, STEP)[None, :]
    exists = (rows < num_rows)[:, None]
    x_rows = x_ptr + rows[:, None] * k + split * PART
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in tl.range(0, PART, STEP, num_stages=STAGES):
        x = tl.load(x_rows + at + ks, mask=exists, other=0.0)
        acc = tl.dot(x, tl.trans(tl.load(weight_rows + at + ks)), acc)
    places = rows[:, None] * n + columns[None, :]
    if SPLITS == 1:
        if bias_ptr is not None:
            acc += biases[None, :]
        tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=exists)
    else:
        size = num_rows * n
        tl.store(parts_ptr + split * size + places, acc, mask=exists)
        tl.debug_barrier()  # all threads have written before one of them counts the arrival
        if (
            tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
            == SPLITS - 1
        ):
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            for part in tl.static_range(SPLITS):
                acc += tl.load(parts_ptr + part * size + places, mask=exists, other=0.0)
            if bias_ptr is not None:
                acc += biases[None, :]
            tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=exists)
            tl.store(arrivals_ptr + tl.program_id(0), 0)


@functools.cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters that are zero between launches; launches that share them run one after the other.

    One per group of columns: a matmul is split only below 4,096 columns, in groups of 32.
    """
    return torch.zeros(4096 // 32, dtype=torch.int32, device=device)


def _tile_columns(n: int) -> int:
    """Columns per program of _tile_kernel. With many columns there are enough programs without
    splitting.
    """
    return 64 if n >= 4096 else 32


def _splits(n: int, k: int) -> int:
    """How many parts, of at most 1,024, k is split into for _tile_kernel; 0 if n or k does not fit
    its tiles.
    """
    splits = triton.next_power_of_2(triton.cdiv(k, 1024)) if n < 4096 else 1
    return splits if n % _tile_columns(n) == 0 and k % (splits * _STEP) == 0 else 0


def _stages(columns: int, device: torch.device) -> int:
    """Pipeline stages of _tile_kernel: four, if they fit. With 64 columns they take 128 KiB of
    shared memory; an RTX 4070 has 99.
    """
    return 4 if columns == 32 or shared_memory(device) >= 128 << 10 else 3


def _parts(k: int) -> int:
    """How many parts of 512 or 1,024, at most four, k is split into; 0 if that is impossible."""
    return next((parts for parts in (1, 2, 3, 4) if k in (512 * parts, 1024 * parts)), 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [rows, k], weight: [n, k], bias: [n] -> x W^T (+ b): [rows, n]."""
    (num_rows, k), n = x.shape, weight.shape[0]
    if not 0 < num_rows <= _TILE_ROWS or x.dtype.itemsize != 2:
        return F.linear(x, weight, bias)
    if num_rows > _SOME_ROWS:
        return (
            _linear_in_tiles(x.contiguous(), weight, bias)
            if _splits(n, k) and n * k < _LARGE
            else F.linear(x, weight, bias)
        )
    return linear_of_few(x, weight, bias) if suits_few(x, weight) else F.linear(x, weight, bias)


def suits_few(x: Tensor, weight: Tensor) -> bool:
    """Whether linear_of_few takes this shape."""
    return 0 < x.shape[0] <= _SOME_ROWS and _parts(x.shape[1]) > 0 and weight.shape[0] % 16 == 0


def linear_of_few(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gate_and_up: bool = False
) -> Tensor:
    """x W^T (+ b) of up to 16 rows. gate_and_up: the weights are gate's rows followed by up's, without a
    bias -> silu(gate) * up.
    """
    x = x.contiguous()
    (num_rows, k), n, parts = x.shape, weight.shape[0], _parts(x.shape[1])
    width = n // 2 if gate_and_up else n
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if num_rows <= _FEW_ROWS:
        columns, warps = (8, 2) if parts == 1 else (4, 4)
        _few_rows_kernel[(n // columns,)](
            x,
            weight,
            bias,
            out,
            width,
            ROWS=num_rows,
            COLUMNS=columns,
            PART=k // parts,
            PARTS=parts,
            GATED=gate_and_up,
            num_warps=warps,
            **pdl(x),
        )
    else:
        rows = 8 if num_rows <= 8 else 16
        # 16 would be no faster in the chain, and too large for an RTX 4070
        columns = 16 if parts <= 2 else 8
        _some_rows_kernel[(n // columns,)](
            x,
            weight,
            bias,
            out,
            num_rows,
            width,
            ROWS=rows,
            COLUMNS=columns,
            SLICES=4,
            PARTS=parts,
            PART=k // parts,
            GATED=gate_and_up,
            num_warps=4,
            **pdl(x),
        )
    return out


def _linear_in_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (num_rows, k), n = x.shape, weight.shape[0]
    splits, columns = _splits(n, k), _tile_columns(n)
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    parts = (
        torch.empty(splits, num_rows, n, dtype=torch.float32, device=x.device)
        if splits > 1
        else out
    )
    _tile_kernel[(n // columns, splits)](
        x,
        weight,
        bias,
        out,
        parts,
        _arrivals(x.device),
        num_rows,
        n,
        k,
        ROWS=_TILE_ROWS,
        COLUMNS=columns,
        STEP=_STEP,
        SPLITS=splits,
        PART=k // splits,
        STAGES=_stages(columns, x.device),
        num_warps=4,
        **pdl(x),
    )
    return out
