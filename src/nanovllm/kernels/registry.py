"""The one place where implementations of operations are chosen. Every call through it is counted,
which proves that a toggle did something.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from nanovllm.config import Optimizations

Operation = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a model except attention; signatures as in kernels/torch/. A matmul may
    fuse the operation that follows.
    """

    linear: Operation
    rms_norm: Operation
    add_rms_norm: Operation
    linear_qk_norm_rope_store_kv: Operation
    linear_silu_and_mul: Operation
    sample: Operation


def load_kernels(optimizations: Optimizations, calls: Counter[str]) -> Kernels:
    """The implementation of `optimizations.kernels`, which names its module; each call adds one to calls[level]."""
    level = optimizations.kernels
    module = import_module(f"nanovllm.kernels.{level}")
    return Kernels(*(counted(getattr(module, f.name), level, calls) for f in fields(Kernels)))


def counted(function: Operation, level: str, calls: Counter[str]) -> Operation:
    """`function`, adding one to calls[level] at each call. Its attribute `level` is the level."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[level] += 1
        return function(*args, **kwargs)

    call.level = level  # type: ignore[attr-defined]
    return call
