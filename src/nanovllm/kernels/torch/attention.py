"""Attention over the paged KV cache: gathered pages and scaled_dot_product_attention.

Query heads that share a KV head are put in the rows of one small matrix, so that K and V are read
once and not repeated.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from nanovllm.kernels.batch import ForwardBatch

# Backends of scaled_dot_product_attention. cuDNN's, PyTorch's first choice on Hopper, is left out: it plans anew
# for every length it has not seen, which takes milliseconds per layer, and nearly every prompt has its own length.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Decodes that are gathered together. Smaller groups pad less and cost more calls.
GROUP = 16


class TorchAttention:
    """The baseline backend: `prepare` once per step, then `attend` once per layer."""

    def __init__(
        self, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.num_kv_heads, self.block_size, self.scale, self.dtype = (
            num_kv_heads,
            block_size,
            head_dim**-0.5,
            dtype,
        )

    def prepare(self, batch: ForwardBatch) -> None:
        """Does the index work that is the same in all layers; batch.attention becomes

        decodes   (entries, pages, bias) of each group of decodes of similar length: a short one is
        not padded to the longest
                  pages: [entries * kv_heads * max_blocks] int64, rows of the cache seen as [blocks
                  * kv_heads, page]
                  bias: [entries, 1, 1, max_blocks * block_size], 0 for tokens of the sequence, -inf
                  past its end
        prefills  (start, end, context, pages, mask) of each; pages and mask are None where nothing
        of it is cached
        """
        n, device = batch.num_decodes, batch.block_tables.device
        lengths, by_length = sorted(batch.host_seq_lens[:n]), batch.seq_lens[:n].argsort()
        decodes, prefills = [], []
        for i in range(0, n, GROUP):
            entries, width = (
                by_length[i : i + GROUP],
                -(-lengths[min(i + GROUP, n) - 1] // self.block_size),
            )
            past = (
                torch.arange(width * self.block_size, device=device)
                >= batch.seq_lens[entries, None]
            )
            bias = torch.zeros(past.shape, dtype=self.dtype, device=device).masked_fill_(
                past, -torch.inf
            )[:, None, None]
            decodes.append((entries, self._pages(batch.block_tables[entries, :width]), bias))
        start = n
        for i in range(n, len(batch.host_query_lens)):
            length, context = batch.host_query_lens[i], batch.host_seq_lens[i]
            cached = mask = None
            # a chunk, or a prompt with a cached prefix: its past is in the cache
            if length < context:
                cached = self._pages(
                    batch.block_tables[i : i + 1, : -(-context // self.block_size)]
                )
                mask = torch.ones(length, context, dtype=torch.bool, device=device).tril_(
                    context - length
                )
            prefills.append((start, start + length, context, cached, mask))
            start += length
        batch.attention = decodes, prefills

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """q: [tokens, q_heads, head_dim]; k, v: [tokens, kv_heads, head_dim], already in the caches
        -> as q.
        """
        decodes, prefills = batch.attention
        output = torch.empty_like(q)
        for entries, pages, bias in decodes:
            keys, values = (
                self._gather(cache, pages, len(entries)) for cache in (k_cache, v_cache)
            )
            # [entries, kv_heads, query heads of each, head_dim]
            grouped = q[entries].unflatten(1, (self.num_kv_heads, -1))
            with sdpa_kernel(BACKENDS):
                out = sdpa(grouped, keys, values, attn_mask=bias, scale=self.scale)
            output[entries] = out.flatten(1, 2)
        for start, end, context, cached, mask in prefills:
            if cached is None:
                keys, values = (
                    k[None, start:end].transpose(1, 2),
                    v[None, start:end].transpose(1, 2),
                )
            else:
                keys, values = (
                    self._gather(cache, cached, 1)[:, :, :context] for cache in (k_cache, v_cache)
                )
            query = q[None, start:end].transpose(1, 2)
            with sdpa_kernel(BACKENDS):
                out = sdpa(
                    query,
                    keys,
                    values,
                    mask,
                    is_causal=mask is None,
                    scale=self.scale,
                    enable_gqa=True,
                )
            output[start:end] = out[0].transpose(0, 1)
        return output

    def _pages(self, block_tables: Tensor) -> Tensor:
        """[entries, blocks] -> [entries * kv_heads * blocks]: the row of each block and head in the
        cache, head by head.
        """
        heads = torch.arange(self.num_kv_heads, device=block_tables.device)
        return (
            block_tables.long()[:, None, :] * self.num_kv_heads + heads[None, :, None]
        ).flatten()

    def _gather(self, cache: Tensor, pages: Tensor, entries: int) -> Tensor:
        """-> [entries, kv_heads, blocks * block_size, head_dim]."""
        picked = cache.view(-1, self.block_size * cache.shape[-1]).index_select(0, pages)
        return picked.view(entries, self.num_kv_heads, -1, cache.shape[-1])
