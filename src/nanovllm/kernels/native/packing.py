"""Weights in the order in which a product reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels.native.library import dtype_code, library, panel


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [outputs, k] for the products of this folder, in place of the tensor.

    data: [groups, panels, k, outputs of a panel]. The outputs come in groups of equal size (a head; gate and up; all),
    each padded with zeros to whole panels.
    """

    data: Tensor
    groups: int
    group_size: int

    @property
    def outputs(self) -> int:
        return self.groups * self.group_size

    @property
    def k(self) -> int:
        return self.data.shape[2]

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of the weight, as an embedding looks them up. numbers: [n] int64 -> [n, k]."""
        width = self.data.shape[3]
        group, within = numbers // self.group_size, numbers % self.group_size
        return self.data[group, within // width, :, within % width]


def pack(weight: Tensor, groups: int = 1) -> PackedWeight:
    """weight: [outputs, k], float32 or bfloat16, whose outputs fall into `groups` of equal size."""
    outputs, k = weight.shape
    size = outputs // groups
    data = torch.empty(groups, -(-size // panel()), k, panel(), dtype=weight.dtype)
    given = weight.detach().contiguous()
    library().pack(dtype_code(weight.dtype), given.data_ptr(), data.data_ptr(), groups, size, k)
    return PackedWeight(data, groups, size)
