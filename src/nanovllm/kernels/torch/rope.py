"""Rotary position embedding (Su et al., 2021), preceded by Qwen3's norm of each head, where a family
has it, and followed by the KV store.
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.torch.kv_store import store_kv
from nanovllm.kernels.torch.norm import rms_norm


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim]; cos_sin: [tokens, head_dim] float32, cosines first. Rotates
    halves, as transformers.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def qk_norm_rope_store_kv(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything between the QKV projection and attention.

    qkv: [tokens, (q_heads + 2 * kv_heads) * head_dim]; q_weight, k_weight: [head_dim], both None
    where heads have no norms; cos_sin: [tokens, head_dim] float32;
    caches: [blocks, kv_heads, block_size, head_dim]; slot_mapping: [tokens].
    Returns q: [tokens, q_heads, head_dim] and k, v: [tokens, kv_heads, head_dim]; k and v are also
    in the cache.
    """
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    q, k, v = qkv.view(qkv.shape[0], -1, head_dim).tensor_split((-2 * kv_heads, -kv_heads), dim=1)
    qk = torch.cat(
        (q, k) if q_weight is None else (rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)),
        dim=1,
    )
    q, k = apply_rope(qk, cos_sin).split((q.shape[1], kv_heads), dim=1)
    store_kv(k, v, k_cache, v_cache, slot_mapping)
    return q, k, v


def linear_qk_norm_rope_store_kv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [tokens, k], weight: [(q_heads + 2 * kv_heads) * head_dim, k]: the QKV matmul, then
    qk_norm_rope_store_kv.
    """
    return qk_norm_rope_store_kv(torch.nn.functional.linear(x, weight, bias), *rest)
