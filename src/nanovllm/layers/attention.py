"""The attention layer, without its projections: chooses a backend, stores K and V, attends.

    once a step    prepare(batch): index work that is the same in all layers
    once a layer   q, k, v = the QKV matmul, then norms of heads, rotation, K and V into the cache (one operation)
                   attend(q, k, v, keys, values, batch)

The operations are those of kernels/. A model owns the projections and the norms of heads.
"""

from collections import Counter
from importlib import import_module

import torch
from torch import Tensor, nn

from nanovllm.config import Optimizations
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.registry import counted

# keys and values of one layer, each [blocks, kv_heads, block_size, head_dim]
KVCache = tuple[Tensor, Tensor]

_BACKENDS = {
    "torch": ("nanovllm.kernels.torch.attention", "TorchAttention"),
    "triton": ("nanovllm.kernels.triton.attention", "TritonAttention"),
    "flash_attn": ("nanovllm.kernels.flash_attn", "FlashAttention"),
    "native": ("nanovllm.kernels.native.attention", "NativeAttention"),
}


class Attention:
    """The attention of a model, one object for all its layers. `prepare` once a step, then a call per layer.

    optimizations.attention_backend chooses who attends; each call of attend adds one to calls[level]. The
    other arguments describe this rank's KV cache. Raises ImportError where the backend's library
    is missing, ValueError for a geometry that it does not compute.
    """

    def __init__(
        self,
        optimizations: Optimizations,
        calls: Counter[str],
        *,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        module, name = _BACKENDS[optimizations.attention_backend]
        backend = getattr(import_module(module), name)(
            num_kv_heads,
            block_size,
            head_dim,
            dtype,
            # a backend that reads shared prefixes once counts them
            **({"cascade": calls} if optimizations.cascade_attention else {}),
        )
        self.prepare = backend.prepare
        self.attend = counted(backend.attend, optimizations.attention_backend, calls)

    def __call__(
        self,
        qkv_proj: nn.Module,
        norms: tuple[Tensor | None, Tensor | None, float],
        x: Tensor,
        cos_sin: Tensor,
        kv_cache: KVCache,
        batch: ForwardBatch,
    ) -> Tensor:
        """qkv_proj: its matmul runs fused with what follows it, up to the KV store. norms: weights of the norms of
        each head of q and of k, [head_dim], and their epsilon; None for weights: the family has no such norms.
        x: [tokens, hidden]; cos_sin: [tokens, head_dim] -> [tokens, this rank's q_heads * head_dim].
        """
        q, k, v = qkv_proj(x, *norms, cos_sin, *kv_cache, batch.slot_mapping)
        return self.attend(q, k, v, *kv_cache, batch).flatten(1)  # type: ignore[no-any-return]
