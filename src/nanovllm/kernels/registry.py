"""The one place where implementations are chosen. Every call through it is counted: that is how a toggle proves it fired."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanovllm.config import Optimizations
from nanovllm.kernels.torch import activation, norm, rope, sampling


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a model beside its matrix products and attention; signatures as in kernels/torch/."""

    rms_norm: Callable[..., Any] = norm.rms_norm
    add_rms_norm: Callable[..., Any] = norm.add_rms_norm
    qk_norm_rope_store_kv: Callable[..., Any] = rope.qk_norm_rope_store_kv
    silu_and_mul: Callable[..., Any] = activation.silu_and_mul
    sample: Callable[..., Any] = sampling.sample


def load_kernels(optimizations: Optimizations, calls: Counter[str]) -> Kernels:
    """The implementation of `optimizations.kernels`; each call adds one to calls[level]."""
    if optimizations.kernels == "compile":
        from nanovllm.kernels.compiled import compile_kernels

        chosen = compile_kernels(Kernels())
    elif optimizations.kernels == "triton":
        _need_triton("kernels")
        from nanovllm.kernels import triton as ours

        chosen = Kernels(ours.rms_norm, ours.add_rms_norm, ours.qk_norm_rope_store_kv, ours.silu_and_mul, ours.sample)
    else:
        chosen = Kernels()
    return Kernels(*(counted(getattr(chosen, name), optimizations.kernels, calls) for name in Kernels.__slots__))


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """prepare(batch): once a step. attend(q, k, v, k_cache, v_cache, batch) -> output: once a layer."""

    prepare: Callable[..., None]
    attend: Callable[..., Any]


def load_attention(optimizations: Optimizations, calls: Counter[str], **geometry: Any) -> AttentionBackend:
    """The implementation of `optimizations.attention_backend`; each call of attend adds one to calls[level]."""
    backend: Any
    if optimizations.attention_backend == "triton":
        _need_triton("attention_backend")
        from nanovllm.kernels.triton.attention import TritonAttention

        backend = TritonAttention(**geometry)
    else:
        from nanovllm.kernels.torch.attention import TorchAttention

        backend = TorchAttention(**geometry)
    return AttentionBackend(backend.prepare, counted(backend.attend, optimizations.attention_backend, calls))


def _need_triton(field: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"{field}='triton' needs Triton, which is not installed: `pip install triton`, or use {field}='torch'")


def counted(function: Callable[..., Any], level: str, calls: Counter[str]) -> Callable[..., Any]:
    """`function`, adding one to calls[level] at each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[level] += 1
        return function(*args, **kwargs)

    return call
