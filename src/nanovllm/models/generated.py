"""Random weights made where they are needed: each rank fills its own shards on its own device, and
reads no file.

For shapes of models too large to build and store, where only the time of a step matters. A weight
is a function of (seed, name of the tensor, row, column): word column % 4 of Philox4x32-10 with
counter (column // 4, row) under the key (seed, CRC-32 of the name), as a uniform number with the
standard deviation below. So the shards of any number of ranks are parts of the same model, on every
device.
"""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.kernels.torch.sampling import philox4x32
from nanovllm.layers.linear import TensorParallel

RECIPE = "generated.json"
"""Takes the place of *.safetensors: {"seed": int}."""
_CHUNK = 1 << 22  # counters at a time: 32 MiB in each of a dozen temporary tensors


def fill(model: nn.Module, folder: Path, tp: TensorParallel) -> None:
    """Fills every parameter. Raises FileNotFoundError where the folder has no recipe either."""
    seed = seed_of(folder)
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, param in parameters.items():
        for part, (begin, end) in (param.parts or {"": (0, len(param))}).items():
            target = param.data[begin:end]
            first = [
                tp.rank * n if dim == param.shard_dim else 0 for dim, n in enumerate(target.shape)
            ]
            _fill(target, f"{name}.{part}", seed, first, tp.size if param.shard_dim == 1 else 1)


def fill_whole(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, packed: Mapping[str, tuple[str, str]]
) -> None:
    """Fills tensors named as in a checkpoint with what all ranks together hold. packed: the
    family's packed_modules_mapping.
    """
    seed = seed_of(folder)
    for name, tensor in tensors:
        *path, module, leaf = name.split(".")
        fused, part = packed.get(module, (module, ""))
        _fill(tensor.data, f"{'.'.join([*path, fused, leaf])}.{part}", seed, [0, 0], 1)


def seed_of(folder: Path) -> int:
    """The seed of the recipe. Raises FileNotFoundError where there is none."""
    recipe = folder / RECIPE
    if not recipe.is_file():
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors; other formats are not read (they can carry code)"
        )
    return int(json.loads(recipe.read_text())["seed"])


def _fill(target: Tensor, name: str, seed: int, first: list[int], ranks_beside: int) -> None:
    """target: [rows, columns] or [columns], part of a tensor, beginning at element `first` of it.
    Every rank's columns must be a multiple of 4.
    """
    matrix = target.view(-1, target.shape[-1])
    rows, columns = matrix.shape
    first_row, first_column = first if target.dim() == 2 else (0, first[0])
    if columns % 4:
        raise ValueError(
            f"{name} has {columns} columns per rank; generated weights need a multiple of 4"
        )
    device = target.device
    low, high = (
        torch.tensor([value & 0xFFFFFFFF], device=device)
        for value in (seed, zlib.crc32(name.encode()))
    )
    across = torch.arange(first_column // 4, (first_column + columns) // 4, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    step = max(1, _CHUNK // len(across))
    for begin in range(0, rows, step):
        part = matrix[begin : begin + step]
        down = torch.arange(first_row + begin, first_row + begin + len(part), device=device)
        words = torch.stack(
            philox4x32(low, high, across[None, :], down[:, None], zero, zero), dim=-1
        )
        noise = (
            words.float().mul_(2.0**-32).sub_(0.5).mul_(math.sqrt(12.0)).view(len(part), columns)
        )
        if ".bias" in name:
            noise.mul_(0.3)
        elif target.dim() == 1:
            noise.mul_(0.1).add_(1.0)  # a norm's weights
        elif "embed_tokens" not in name:
            noise.mul_(1.0 / math.sqrt(columns * ranks_beside))
        part.copy_(noise)
