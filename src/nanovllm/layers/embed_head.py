"""Token embedding and output head, both sharded over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.linear import TensorParallel, copy_into, shard


class VocabParallelEmbedding(nn.Module):
    """Rank r holds rows [r * n, (r + 1) * n) of the table. Raises ValueError where the ranks cannot share it evenly."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        if vocab_size % tp.size:
            raise ValueError(f"a vocabulary of {vocab_size} cannot be shared by {tp.size} tensor-parallel ranks")
        self.tp = tp
        self.num_rows = vocab_size // tp.size
        self.weight = nn.Parameter(torch.empty(self.num_rows, hidden_size), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, param: Tensor, source: Any, shard_id: str | None = None) -> None:
        copy_into(param, shard(source, 0, self.tp.rank, self.tp.size))

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.tp.rank * self.num_rows
        mine = (local >= 0) & (local < self.num_rows)
        return self.tp.all_reduce(F.embedding(local * mine, self.weight) * mine[:, None])

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], on every rank."""
        return self.tp.all_gather(F.linear(hidden, self.weight))
