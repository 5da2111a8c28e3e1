"""What all kernels here share: programmatic dependent launch, shared memory and block sizes.

A decode step is hundreds of kernels of a few microseconds. On Hopper and later, a kernel launched
with `launch_pdl` may start while its predecessor still runs: its prologue (index arithmetic, loads
of weights) overlaps the predecessor's tail. It must call `wait_for_inputs` before it touches
anything that the kernels right before it write or read. Every kernel in this folder does. The wait
is no barrier for earlier kernels, as the kernel in front may itself be waiting. What attention
reads before its wait was written by `prepare`, and the embedding, an ordinary kernel, runs between
the two: it begins when all kernels before it have ended. CUDA C++ programming guide, "Programmatic
dependent launch and synchronization".
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

STANDS_FOR: ContextVar[torch.device | None] = ContextVar("STANDS_FOR", default=None)
"""The device that kernels are compiled for where tensors are on the meta device: gpu/rehearsal.py
compiles before real tensors exist.
"""


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Lets the next kernel start its prologue as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Waits until the kernels before this one have finished; lets the next one start its prologue
    meanwhile.
    """
    if PDL:
        gdc_launch_dependents()  # calling it twice is harmless
        gdc_wait()


@triton.jit
def prefetch_to_l2(pointers):
    """Starts fetching the lines that hold these addresses from memory; changes nothing."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@functools.cache
def _supports_pdl(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index)[0] >= 9


def pdl(x: Tensor, fp_fusion: bool = True) -> dict[str, Any]:
    """Launch arguments for a kernel that works on x's device. fp_fusion: multiply-adds may be
    rounded once. It is always passed, because Triton's default is changing: up to 3.9 it fuses and
    warns, from 3.10 on it does not.
    """
    device = x.device if x.is_cuda else STANDS_FOR.get()
    if device is not None and _supports_pdl(device.index):
        return {"PDL": True, "launch_pdl": True, "enable_fp_fusion": fp_fusion}
    return {"PDL": False, "enable_fp_fusion": fp_fusion}


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; without a GPU, those of an RTX 4070."""
    return _shared_memory(device if device.type == "cuda" else STANDS_FOR.get() or device)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if device.type == "cuda"
        else 99 << 10
    )


def warps_for(block: int) -> int:
    """Warps for a program that handles `block` elements: eight per thread, so that bfloat16 moves
    16 bytes at a time.
    """
    return min(16, max(1, block // 256))
