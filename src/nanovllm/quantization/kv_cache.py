"""kv_cache_dtype='fp8_e4m3': a KV cache of one byte a value.

A key or value is divided by the scale of its head, rounded to e4m3 when it is stored, and multiplied with the scale when it is
read. Attention reads all keys and values so, also those of the tokens of the step itself: what a request computes does not depend
on where its prompt is cut, or on what was found in the prefix cache. Scales are 1.0, vLLM's default where a checkpoint has none:
values beyond 448 saturate, and none is calibrated.
"""

from collections import Counter
from importlib import import_module
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from nanovllm.config import Optimizations
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.registry import counted
from nanovllm.kernels.torch.attention import TorchAttention
from nanovllm.layers.attention import Attention, KVCache
from nanovllm.models.config import ModelConfig
from nanovllm.quantization.weights import E4M3, check_fp8, to_e4m3


class Stored(NamedTuple):
    """Keys or values of a layer. cache: e4m3 [blocks, kv_heads, block_size, head_dim]; scales: float32 [kv_heads, 1]."""

    cache: Tensor
    scales: Tensor

    def store(self, new: Tensor, slot_mapping: Tensor) -> Tensor:
        """new: [tokens, kv_heads, head_dim]; slot_mapping: [tokens] -> what will be read in its place, as new."""
        rounded = to_e4m3(new.float() / self.scales)
        size = self.cache.shape[2]
        # as bytes: not every device can index e4m3
        self.cache.view(torch.uint8)[slot_mapping // size, :, slot_mapping % size] = rounded.view(
            torch.uint8
        )
        return (rounded.float() * self.scales).to(new.dtype)


class TorchAttentionOfStored(TorchAttention):
    """TorchAttention whose caches are of type Stored."""

    def _gather(self, cache: Stored, pages: Tensor, entries: int) -> Tensor:  # type: ignore[override]
        picked = super()._gather(cache.cache.view(torch.uint8), pages, entries).view(E4M3)
        return (picked.float() * cache.scales[:, None]).to(self.dtype)


class SmallCacheAttention(Attention):
    """The interface of Attention, for caches in e4m3. Each call adds one to calls['fp8_e4m3'], too.

    The fused operation before attention, whichever kernels compute it, stores keys and values in its own dtype: here in a
    scratch cache of the step's tokens, from which nothing is read. Triton's kernels store them in e4m3 themselves, where Triton's
    attention, which reads the cache alone, follows: a GPU rounds and saturates as to_e4m3 does.
    """

    @classmethod
    def of(cls, runner: ModelRunner, model: ModelConfig) -> Self:
        """That of a runner whose model is not made yet."""
        return cls(
            runner.config.optimizations,
            runner.stats.attention_calls,
            num_kv_heads=model.num_key_value_heads // runner.tp.size,
            block_size=runner.config.block_size,
            head_dim=model.head_dim,
            dtype=getattr(torch, runner.config.dtype),
            device=runner.device,
        )

    def __init__(
        self,
        optimizations: Optimizations,
        calls: Counter[str],
        *,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_fp8("kv_cache_dtype", optimizations.kv_cache_dtype, device)
        backend: Any = TorchAttentionOfStored(num_kv_heads, block_size, head_dim, dtype)
        self.stored_by_kernel = optimizations.kernels == optimizations.attention_backend == "triton"
        if optimizations.attention_backend == "triton":
            module = import_module("nanovllm.quantization.triton")
            cascade = {"cascade": calls} if optimizations.cascade_attention else {}
            # the scales of what kernels store are 1
            made = (
                module.TritonAttention if self.stored_by_kernel else module.TritonAttentionOfStored
            )
            backend = made(num_kv_heads, block_size, head_dim, dtype, **cascade)
        self.shape = num_kv_heads, block_size, head_dim
        self.key_scales, self.value_scales = torch.ones(
            2, num_kv_heads, 1, dtype=torch.float32, device=device
        )
        self.prepare = backend.prepare
        self.attend = counted(
            counted(backend.attend, optimizations.attention_backend, calls),
            optimizations.kv_cache_dtype,
            calls,
        )

    def __call__(
        self,
        qkv_proj: nn.Module,
        norms: tuple[Tensor | None, Tensor | None, float],
        x: Tensor,
        cos_sin: Tensor,
        kv_cache: KVCache,
        batch: ForwardBatch,
    ) -> Tensor:
        """See Attention; kv_cache in e4m3."""
        if self.stored_by_kernel:
            return super().__call__(qkv_proj, norms, x, cos_sin, kv_cache, batch)
        keys, values = (
            Stored(cache, scales)
            for cache, scales in zip(kv_cache, (self.key_scales, self.value_scales), strict=True)
        )
        num_kv_heads, block_size, head_dim = self.shape
        scratch = x.new_empty(2, -(-len(x) // block_size), num_kv_heads, block_size, head_dim)
        slots = torch.arange(len(x), device=x.device)
        q, k, v = qkv_proj(x, *norms, cos_sin, *scratch, slots)
        k, v = keys.store(k, batch.slot_mapping), values.store(v, batch.slot_mapping)
        return self.attend(q, k, v, keys, values, batch).flatten(1)  # type: ignore[no-any-return]
