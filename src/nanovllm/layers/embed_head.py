"""Token embedding and output head; the head is sharded over the vocabulary."""

import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.linear import TensorParallel, parameter


class VocabParallelEmbedding(nn.Module):
    """Every rank holds the whole table, as looking up a few rows costs less than a sum over ranks.
    The head uses rows [r * n, (r + 1) * n) on rank r.

    only_head: the table is not used for lookups, and rank r holds only its rows.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorParallel, only_head: bool = False
    ) -> None:
        super().__init__()
        n = tp.share(vocab_size, "tokens of the vocabulary")
        self.weight = (
            parameter(n, hidden_size, shard_dim=0)
            if only_head
            else parameter(vocab_size, hidden_size)
        )
        self.head = slice(None) if only_head else slice(tp.rank * n, (tp.rank + 1) * n)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        return F.embedding(token_ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, this rank's part of the vocabulary]."""
        return F.linear(hidden, self.weight[self.head])
