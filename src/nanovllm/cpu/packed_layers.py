"""kernels=native: a loaded model's weights, packed. Each weight replaces its original before the next one is packed, so
memory grows by one weight at a time.
"""

from typing import Any

from torch import Tensor, nn

from nanovllm.kernels.native.operations import GROUPS
from nanovllm.kernels.native.packing import PackedWeight, pack
from nanovllm.kernels.registry import Kernels, Operation
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear


class PackedEmbedding(nn.Module):
    """The interface of VocabParallelEmbedding, whose table is packed: the head's product and lookups read it."""

    def __init__(self, weight: PackedWeight, linear: Operation) -> None:
        super().__init__()
        self.weight, self.linear = weight, linear

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        return self.weight.rows(token_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary]."""
        return self.linear(hidden, self.weight)  # type: ignore[no-any-return]


def pack_weights(model: nn.Module, kernels: Kernels, head_dim: int, whole: bool) -> None:
    """Packs the weights of all products of a model that are not quantized. whole: this rank holds the whole model;
    otherwise the embedding, of which the head reads a part, stays as it is.
    """
    groups = {getattr(kernels, name): of for name, of in GROUPS.items()}
    embeddings: dict[nn.Module, PackedEmbedding] = {}
    for module in list(model.modules()):
        # what is quantized stays as it is
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and isinstance(
            module.weight, Tensor
        ):
            weight, matmul = module.weight, getattr(module, "matmul", None)
            _replace(
                module,
                pack(weight, groups[matmul](len(weight), head_dim) if matmul in groups else 1),
            )
        for name, child in module.named_children():
            if whole and isinstance(child, VocabParallelEmbedding):
                if child not in embeddings:
                    embeddings[child] = PackedEmbedding(pack(child.weight), kernels.linear)
                    del child.weight
                setattr(module, name, embeddings[child])


def _replace(module: Any, weight: PackedWeight) -> None:
    """A parameter gives way to what is no parameter."""
    del module.weight
    module.weight = weight
