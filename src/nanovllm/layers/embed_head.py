"""Token embedding and output head, both sharded over the vocabulary."""

import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.linear import TensorParallel, parameter


class VocabParallelEmbedding(nn.Module):
    """Rank r holds rows [r * n, (r + 1) * n) of the table."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.num_rows = tp.share(vocab_size, "tokens of the vocabulary")
        self.weight = parameter(self.num_rows, hidden_size, shard_dim=0)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.tp.rank * self.num_rows
        mine = (local >= 0) & (local < self.num_rows)
        return self.tp.all_reduce(F.embedding(local * mine, self.weight) * mine[:, None])

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, this rank's part of the vocabulary]."""
        return F.linear(hidden, self.weight)
