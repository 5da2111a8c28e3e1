"""Writes the K and V of new tokens into the paged cache."""

from torch import Tensor


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k, v: [tokens, kv_heads, head_dim]; caches: [blocks, kv_heads, block_size, head_dim];
    slot_mapping: [tokens].
    """
    block, offset = slot_mapping // k_cache.shape[2], slot_mapping % k_cache.shape[2]
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v
