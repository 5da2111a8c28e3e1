"""Attention over the paged KV cache: gathered pages and scaled_dot_product_attention.

Query heads that share a KV head are put in the rows of one small matrix, so that K and V are read once and not repeated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.batch import ForwardBatch


class TorchAttention:
    """The baseline backend; `prepare` once a step, then `attend` once a layer."""

    def __init__(self, num_kv_heads: int, block_size: int, scale: float, dtype: torch.dtype) -> None:
        self.num_kv_heads, self.block_size, self.scale, self.dtype = num_kv_heads, block_size, scale, dtype

    def prepare(self, batch: ForwardBatch) -> None:
        """Does the index work that is the same in all layers; batch.attention becomes

        pages     [decodes * kv_heads * max_blocks] int64: rows of the cache seen as [blocks * kv_heads, page]
        bias      [decodes, 1, 1, max_blocks * block_size]: 0 for tokens of the sequence, -inf past its end
        prefills  (start, end, context, pages, mask) of each; pages and mask are None where nothing of it is cached
        """
        n, device = batch.num_decodes, batch.block_tables.device
        pages = bias = None
        if n:
            width = -(-max(batch.host_seq_lens[:n]) // self.block_size)
            pages = self._pages(batch.block_tables[:n, :width])
            past = torch.arange(width * self.block_size, device=device) >= batch.seq_lens[:n, None]
            bias = torch.zeros(past.shape, dtype=self.dtype, device=device).masked_fill_(past, -torch.inf)[:, None, None]
        prefills = []
        start = n
        for i in range(n, len(batch.host_query_lens)):
            length, context = batch.host_query_lens[i], batch.host_seq_lens[i]
            cached = mask = None
            if length < context:  # a chunk, or a prompt with a cached prefix: its past is in the cache
                cached = self._pages(batch.block_tables[i : i + 1, : -(-context // self.block_size)])
                mask = torch.ones(length, context, dtype=torch.bool, device=device).tril_(context - length)
            prefills.append((start, start + length, context, cached, mask))
            start += length
        batch.attention = pages, bias, prefills

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch) -> Tensor:
        """q: [tokens, q_heads, head_dim]; k, v: [tokens, kv_heads, head_dim], already in the caches -> as q."""
        pages, bias, prefills = batch.attention
        n = batch.num_decodes
        kv_heads, group, head_dim = self.num_kv_heads, q.shape[1] // self.num_kv_heads, q.shape[2]
        outputs = []
        if n:
            keys, values = (self._gather(cache, pages, n) for cache in (k_cache, v_cache))
            grouped = q[:n].view(n, kv_heads, group, head_dim)
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=self.scale)
            outputs.append(out.reshape(n, -1, head_dim))
        for start, end, context, cached, mask in prefills:
            if cached is None:
                keys, values = k[None, start:end].transpose(1, 2), v[None, start:end].transpose(1, 2)
            else:
                keys, values = (self._gather(cache, cached, 1)[:, :, :context] for cache in (k_cache, v_cache))
            query = q[None, start:end].transpose(1, 2)
            causal = mask is None
            out = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, scale=self.scale, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _pages(self, block_tables: Tensor) -> Tensor:
        """[entries, blocks] -> [entries * kv_heads * blocks]: the page of each block and head, head by head."""
        heads = torch.arange(self.num_kv_heads, device=block_tables.device)
        return (block_tables.long()[:, None, :] * self.num_kv_heads + heads[None, :, None]).flatten()

    def _gather(self, cache: Tensor, pages: Tensor, entries: int) -> Tensor:
        """-> [entries, kv_heads, blocks * block_size, head_dim]."""
        head_dim = cache.shape[-1]
        picked = cache.view(-1, self.block_size * head_dim).index_select(0, pages)
        return picked.view(entries, self.num_kv_heads, -1, head_dim)
