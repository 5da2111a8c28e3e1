"""Matmuls sharded over tensor-parallel ranks as in Megatron-LM (Shoeybi et al., 2019).

A parameter knows which part of a checkpoint's tensor belongs to its rank, and the loader reads only
that part:

    shard_dim   the dimension that is split over the ranks; None: every rank holds all of it
    parts       name -> (begin, end): rows that come from separate tensors (q, k and v are one matmul)
"""

import torch
from torch import Tensor, nn

from nanovllm.kernels.registry import Kernels, Operation


class TensorParallel:
    """The group of ranks that share a model. This is the group of one; distributed/collectives.py
    has the real one.

    whole_experts: a rank holds some experts of a mixture whole, instead of its part of each.
    """

    rank, size, whole_experts = 0, 1, False

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, [n, m], side by side: [n, size * m]."""
        return x

    def over_shards(self, kernels: Kernels) -> Kernels:
        """Kernels whose sampler takes this rank's part of the logits."""
        return kernels

    def agree_on_least(self, value: int) -> int:
        """The least of every rank's value."""
        return value

    def share(self, total: int, what: str) -> int:
        """This rank's part of `total`. Raises ValueError where the number of ranks does not divide
        it.
        """
        if total % self.size:
            raise ValueError(
                f"tensor_parallel_size={self.size} does not divide the model's {total} {what}; take a divisor"
            )
        return total // self.size


def parameter(
    *shape: int, shard_dim: int | None = None, parts: dict[str, tuple[int, int]] | None = None
) -> nn.Parameter:
    """An uninitialized parameter with what the loader needs to know about it."""
    param = nn.Parameter(torch.empty(*shape), requires_grad=False)
    param.shard_dim, param.parts = shard_dim, parts  # type: ignore[attr-defined]
    return param


class ColumnParallelLinear(nn.Module):
    """matmul(x, W, b, ...): x W^T (+ b), fused with the operation that follows it. Outputs are
    split over the ranks.

    parts: name of each projection -> its outputs over all ranks.
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        matmul: Operation,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.matmul = matmul
        rows, total = {}, 0
        for name, size in parts.items():
            rows[name] = (total, total := total + tp.share(size, f"outputs of {name}_proj"))
        self.weight = parameter(total, in_features, shard_dim=0, parts=rows)
        self.bias = parameter(total, shard_dim=0, parts=rows) if bias else None

    def forward(self, x: Tensor, *rest: object) -> Tensor | tuple[Tensor, ...]:
        return self.matmul(x, self.weight, self.bias, *rest)


class RowParallelLinear(nn.Module):
    """y = x W^T (+ b): inputs are split over the ranks, and their results are summed."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, kernels: Kernels, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.linear, self.tp = kernels.linear, tp
        self.weight = parameter(
            out_features, tp.share(in_features, "inputs of a projection"), shard_dim=1
        )
        self.bias = parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.tp.all_reduce(self.linear(x, self.weight))
        return y if self.bias is None else y + self.bias
