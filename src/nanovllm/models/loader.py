"""Weights from safetensors, and from nothing else: no pickle, no remote code. A rank reads only its part of each tensor."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def resolve_model(name_or_path: str) -> Path:
    """A folder as it is; otherwise a hub id, fetched into the hub's own cache. Raises FileNotFoundError with what to do."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"model {name_or_path!r} is neither a folder here nor a hub id that can be fetched from here "
            f"({type(error).__name__}): give a folder with config.json and *.safetensors, or build one that needs no hub "
            "with `python -m nanovllm.models.checkpoint tiny`"
        ) from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fills every parameter through its `weight_loader`.

    Raises FileNotFoundError where there are no safetensors; ValueError for a file that is truncated, and for tensors that
    are missing, unknown or of another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors; other formats are not read (they can carry code)")
    parameters = dict(model.named_parameters())
    packed: dict[str, tuple[str, str]] = model.packed_modules_mapping  # type: ignore[assignment]
    missing = {(name, part) for name in parameters for part in _parts(name, packed)}
    unknown = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    target = _target(name, packed)
                    if target in missing:
                        missing.remove(target)
                        _load(parameters[target[0]], tensors.get_slice(name), target[1], name, file)
                    elif not (name == "lm_head.weight" and name not in parameters):  # a tied head may be stored as well
                        unknown.append(name)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): it is truncated or damaged; fetch it again") from error
    if missing:
        raise ValueError(f"{folder} lacks {_listed([n if p is None else f'{n} ({p})' for n, p in missing])}")
    if unknown:
        raise ValueError(f"{folder} holds tensors that the model has no place for: {_listed(unknown)}")


def _target(name: str, packed: dict[str, tuple[str, str]]) -> tuple[str, str | None]:
    """The parameter a tensor belongs to, and which part of it: q_proj.weight -> (qkv_proj.weight, "q")."""
    head, _, leaf = name.rpartition(".")
    prefix, _, module = head.rpartition(".")
    if module in packed:
        fused, part = packed[module]
        return f"{prefix}.{fused}.{leaf}", part
    return name, None


def _parts(name: str, packed: dict[str, tuple[str, str]]) -> list[str | None]:
    module = name.split(".")[-2]
    return [part for fused, part in packed.values() if fused == module] or [None]


def _load(param: Tensor, source: object, part: str | None, name: str, file: Path) -> None:
    try:
        param.weight_loader(param, source, part)  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(f"{name} of {file} {error}") from error


def _listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
