"""Matrix products, sharded over tensor-parallel ranks as in Megatron-LM (Shoeybi et al., 2019).

Every parameter carries a `weight_loader(param, source, shard_id)`: `source` is a slice of a safetensors file, and a rank
reads only its part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TensorParallel:
    """The group of ranks that share a model. This one is the group of one; workers.py has the real one."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's x."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x: [n, m], side by side: [n, size * m]."""
        return x

    def agree_on_least(self, value: int) -> int:
        """The least of every rank's value."""
        return value


def shard(source: Any, dim: int, rank: int, size: int) -> Tensor:
    """This rank's part of a slice of a safetensors file, along `dim`. Raises ValueError where it does not divide."""
    total = source.get_shape()[dim]
    if total % size:
        raise ValueError(f"a dimension of {total} cannot be shared by {size} tensor-parallel ranks")
    part = slice(rank * (total // size), (rank + 1) * (total // size))
    return source[part] if dim == 0 else source[:, part]


def copy_into(param: Tensor, values: Tensor) -> None:
    """Raises ValueError where shapes differ: a tensor of another model."""
    if param.shape != values.shape:
        raise ValueError(f"has shape {tuple(values.shape)} where the model needs {tuple(param.shape)}")
    param.data.copy_(values)


def load_replicated(param: Tensor, source: Any, shard_id: str | None = None) -> None:
    """A parameter that every rank holds in full."""
    copy_into(param, source[:])


class ColumnParallelLinear(nn.Module):
    """y = x W^T (+ b), the outputs shared out over the ranks. Several projections of the same input are one product.

    parts: name -> number of outputs (over all ranks), in the order in which this rank's outputs are laid out.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.offsets: dict[str, tuple[int, int]] = {}
        total = 0
        for name, size in parts.items():
            if size % tp.size:
                raise ValueError(f"{name} has {size} outputs, which {tp.size} tensor-parallel ranks cannot share")
            self.offsets[name] = (total, total + size // tp.size)
            total += size // tp.size
        self.weight = nn.Parameter(torch.empty(total, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(total), requires_grad=False) if bias else None
        for param in self.parameters():
            param.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, param: Tensor, source: Any, shard_id: str) -> None:
        begin, end = self.offsets[shard_id]
        copy_into(param[begin:end], shard(source, 0, self.tp.rank, self.tp.size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T (+ b), the inputs shared out over the ranks and their products summed."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(out_features, in_features // tp.size), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        if self.bias is not None:
            self.bias.weight_loader = load_replicated  # type: ignore[attr-defined]

    def load(self, param: Tensor, source: Any, shard_id: str | None = None) -> None:
        copy_into(param, shard(source, 1, self.tp.rank, self.tp.size))

    def forward(self, x: Tensor) -> Tensor:
        y = self.tp.all_reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias
