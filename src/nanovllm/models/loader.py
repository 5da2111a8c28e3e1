"""Weights from safetensors, and from nothing else: no pickle, no remote code. A rank reads only its
part of each tensor.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.layers.linear import TensorParallel


def resolve_model(name_or_path: str) -> Path:
    """A folder as it is, or the folder of a downloaded hub id. Raises FileNotFoundError where it is
    neither.
    """
    if (folder := Path(name_or_path).expanduser()).is_dir():
        return folder
    from nanovllm.models.hub import fetch

    return fetch(name_or_path)


def load_weights(model: nn.Module, folder: Path, tp: TensorParallel) -> None:
    """Fills every parameter.

    Raises FileNotFoundError where there are no safetensors. Raises ValueError for a truncated file;
    for tensors that are missing, unknown or of another shape; and for a stored head that differs
    from the tied one.
    """
    if not (files := sorted(folder.glob("*.safetensors"))):
        from nanovllm.models.generated import fill

        fill(model, folder, tp)  # or raises FileNotFoundError
        return
    if [file.name for file in files] != ["model.safetensors"]:
        from nanovllm.models.weight_files import weight_files

        files = weight_files(folder, warn=tp.rank == 0)
    parameters: dict[str, Any] = dict(model.named_parameters())
    missing = {(name, part) for name, param in parameters.items() for part in param.parts or [None]}
    left_over: list[tuple[Path, str]] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    target, part = _target(name, model.packed_modules_mapping)  # type: ignore[arg-type]
                    if (target, part) in missing:
                        missing.remove((target, part))
                        _load(
                            parameters[target],
                            part,
                            tensors.get_slice(name),
                            tp,
                            f"{name} of {file}",
                        )
                    else:
                        left_over.append((file, name))
        except SafetensorError as error:
            raise ValueError(
                f"{file} cannot be read ({error}): it is truncated or damaged; fetch it again"
            ) from error
    if missing or left_over:
        from nanovllm.models.weight_files import check_left_over

        check_left_over(folder, missing, left_over, model)


def _target(name: str, packed: dict[str, tuple[str, str]]) -> tuple[str, str | None]:
    """The parameter a tensor belongs to, and which part of it: a.q_proj.weight ->
    (a.qkv_proj.weight, "q").
    """
    *path, module, leaf = ["", *name.split(".")]
    fused, part = packed.get(module, (module, None))
    return ".".join([*path[1:], fused, leaf]), part


def _load(param: Any, part: str | None, source: Any, tp: TensorParallel, name: str) -> None:
    """Reads this rank's share of `source`, a slice of a file, into `part` of the parameter."""
    target: Tensor = param.data if part is None else param.data[slice(*param.parts[part])]
    ranks = [
        (tp.rank, tp.size) if dim == param.shard_dim else (0, 1) for dim in range(target.dim())
    ]
    expected = [n * size for n, (_, size) in zip(target.shape, ranks, strict=True)]
    if source.get_shape() != expected:
        raise ValueError(f"{name} has shape {source.get_shape()} where the model needs {expected}")
    target.copy_(
        source[
            tuple(
                slice(rank * n, (rank + 1) * n)
                for n, (rank, _) in zip(target.shape, ranks, strict=True)
            )
        ]
    )
