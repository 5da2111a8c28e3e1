"""Which safetensors files of a folder are the model, and what to do with tensors that are not the
model's. Loaded only where there is more than one model.safetensors to choose from, or tensors are
missing or left over.

A folder may hold other files: shards of another split, Mistral's consolidated.safetensors, the
adapter of a merged model, the original weights beside converted ones. The index decides which files
count, or their names do, as in HF and vLLM.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
NEVER_A_MODEL = ("consolidated", "adapter_")
"""Beginnings of the names of files that hold the weights a second time, under other names, or
changes to them.
"""
COMPUTED_HERE = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Ends of the names of tensors that older versions of transformers stored, and that follow from config.json: HF
and vLLM pass over them, too.
"""


def weight_files(folder: Path, warn: bool = True) -> list[Path]:
    """The files whose tensors are the model's, sorted; [] where there are none.

    Those that the index names; without an index, model.safetensors; without either, every
    *.safetensors that is not known to be something else. warn: name files that are passed over.
    Raises ValueError for an index that names a missing file, and where a model.safetensors lies
    beside an index that does not name it: HF reads that file, vLLM those of the index.
    """
    there = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        listed = read_index(folder / INDEX)
        if (folder / WHOLE).is_file() and WHOLE not in listed:
            raise ValueError(
                f"{folder} holds {WHOLE} and {INDEX}, which does not name it; HF reads the one, vLLM what the other "
                "names: remove the one that is not meant"
            )
        if missing := [name for name in listed if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} lacks {missing[0]}, of which {INDEX} says that it holds "
                f"{shortened(listed[missing[0]])}: fetch the folder again"
            )
        chosen = [folder / name for name in sorted(listed)]
    elif (folder / WHOLE).is_file():
        chosen = [folder / WHOLE]
    else:
        chosen = [file for file in there if not file.name.startswith(NEVER_A_MODEL)]
    if warn and (passed_over := [file.name for file in there if file not in chosen]):
        warnings.warn(
            f"{folder}: the model is read from {', '.join(file.name for file in chosen) or 'no file'}; not from "
            f"{', '.join(passed_over)}",
            stacklevel=2,
        )
    return chosen


def read_index(index: Path) -> dict[str, list[str]]:
    """The tensors of each file that an index names. Raises ValueError for a file that is not an
    index.
    """
    files: dict[str, list[str]] = {}
    try:
        for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(name, []).append(tensor)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{index} is not an index of weights, {{"weight_map": {{tensor: file}}}} ({error!r})'
        ) from error
    here = [
        name
        for name in files
        if isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
    ]
    if wrong := [name for name in files if name not in here]:
        raise ValueError(
            f"{index} names {wrong[0]!r}; only *.safetensors of its own folder are read"
        )
    return files


def check_left_over(
    folder: Path,
    missing: set[tuple[str, str | None]],
    left_over: list[tuple[Path, str]],
    model: nn.Module,
) -> None:
    """Raises ValueError for parameters that no tensor filled, for tensors that belong to none and are
    neither COMPUTED_HERE nor another rank's, and for a stored head that is not the tied one. missing: parameters,
    with the part of each. left_over: tensors, with the file of each. model: where it leaves whole tensors to other
    ranks, it has `is_elsewhere(name)`.
    """
    if missing and (folder / "modules.json").is_file():
        raise ValueError(
            f"{folder} is a model of sentence-transformers (it holds modules.json): it makes embeddings, such as "
            "Qwen3-Embedding, and has no language modelling head, so it generates no text"
        )
    if missing:
        raise ValueError(
            f"{folder} lacks {shortened([name if part is None else f'{name} ({part})' for name, part in missing])}"
        )
    is_elsewhere: Any = getattr(model, "is_elsewhere", lambda name: False)
    left_over = [
        (file, name)
        for file, name in left_over
        if not name.endswith(COMPUTED_HERE) and not is_elsewhere(name)
    ]
    if unknown := [name for _, name in left_over if name != "lm_head.weight"]:
        raise ValueError(
            f"{folder} holds tensors that the model has no place for: {shortened(unknown)}"
        )
    for file, _ in left_over:  # a tied head may also be stored
        check_tied_head(file, model.get_parameter("model.embed_tokens.weight"))


def check_tied_head(file: Path, embedding: Tensor) -> None:
    """Raises ValueError where the lm_head.weight in `file` is not the embedding that the head is
    tied to: HF 5 would use the stored one, older versions the tied one, so only the checkpoint's
    owner can say which is right.
    """
    with safe_open(file, framework="pt") as tensors:
        stored = tensors.get_tensor("lm_head.weight")
    if stored.shape != embedding.shape or not torch.equal(
        stored.to(embedding.dtype), embedding.detach().cpu()
    ):
        raise ValueError(
            f"{file} holds an lm_head.weight that differs from model.embed_tokens.weight, and config.json says "
            "tie_word_embeddings: true, which makes them one. If the stored head is the right one (transformers 5 "
            "takes it), set tie_word_embeddings to false in config.json; if not, remove lm_head.weight from the file"
        )


def shortened(names: list[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(sorted(names)[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
