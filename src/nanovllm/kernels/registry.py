"""The one place where implementations are chosen. Every call through it is counted: that is how a
toggle proves it fired.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from nanovllm.config import Optimizations

_KERNELS = {
    "torch": "nanovllm.kernels.torch",
    "compile": "nanovllm.kernels.compiled",
    "triton": "nanovllm.kernels.triton",
}
_ATTENTION = {
    "torch": "attention.TorchAttention",
    "triton": "attention.TritonAttention",
    "flash_attn": "FlashAttention",
}

Operation = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a model beside attention; signatures as in kernels/torch/. A product may
    take what follows it along.
    """

    linear: Operation
    rms_norm: Operation
    add_rms_norm: Operation
    linear_qk_norm_rope_store_kv: Operation
    linear_silu_and_mul: Operation
    sample: Operation


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """prepare(batch): once a step. attend(q, k, v, k_cache, v_cache, batch) -> output: once a
    layer.
    """

    prepare: Callable[..., None]
    attend: Operation


def load_kernels(optimizations: Optimizations, calls: Counter[str]) -> Kernels:
    """The implementation of `optimizations.kernels`; each call adds one to calls[level]."""
    level = optimizations.kernels
    module = import_module(_KERNELS[level])
    return Kernels(*(counted(getattr(module, f.name), level, calls) for f in fields(Kernels)))


def load_attention(
    optimizations: Optimizations, calls: Counter[str], **geometry: Any
) -> AttentionBackend:
    """The implementation of `optimizations.attention_backend`; each call of attend adds one to
    calls[level].
    """
    module, _, name = (
        f"nanovllm.kernels.{(level := optimizations.attention_backend)}.{_ATTENTION[level]}".rpartition(
            "."
        )
    )
    # it counts what it reads once
    geometry |= {"cascade": calls} if optimizations.cascade_attention else {}
    backend = getattr(import_module(module), name)(**geometry)
    return AttentionBackend(backend.prepare, counted(backend.attend, level, calls))


def counted(function: Operation, level: str, calls: Counter[str]) -> Operation:
    """`function`, adding one to calls[level] at each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[level] += 1
        return function(*args, **kwargs)

    return call
