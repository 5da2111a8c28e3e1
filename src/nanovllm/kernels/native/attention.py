"""attention_backend=native: keys and values are read where they lie in the paged cache, by decodes and prompts alike."""

import torch
from torch import Tensor

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.native.library import dtype_code, library


class NativeAttention:
    """The interface of TorchAttention. Raises TypeError for a dtype that is not computed."""

    def __init__(
        self, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.num_kv_heads, self.block_size, self.head_dim = num_kv_heads, block_size, head_dim
        self.scale, self.dtype = head_dim**-0.5, dtype_code(dtype)
        self.kernel = library().attend

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing is the same in all layers but the addresses of the batch's own tensors."""
        starts, seq_lens = (
            batch.query_start_loc.long().contiguous(),
            batch.seq_lens.int().contiguous(),
        )
        tables = batch.block_tables
        if tables.stride(1) != 1:
            tables = tables.contiguous()
        batch.attention = tables, seq_lens, starts

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """q: [tokens, q_heads, head_dim]; k, v: already in the caches, and not read here -> as q."""
        tables, seq_lens, starts = batch.attention
        q = q.contiguous()
        q_heads = q.shape[1]
        output = torch.empty_like(q)
        self.kernel(
            self.dtype, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), output.data_ptr(), tables.data_ptr(),
            tables.stride(0), seq_lens.data_ptr(), starts.data_ptr(), len(seq_lens), q_heads, self.num_kv_heads,
            self.head_dim, self.block_size, k_cache.stride(0), self.scale,
        )  # fmt: skip
        return output
