"""Where the files of a model that is no folder are: of a preset or a converted model in the cache, of a
hub id in the hub's cache. Loaded only when the name is not a folder.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from nanovllm.cxx import cache_folder
from nanovllm.models.checkpoint import GENERATED, PRESETS, ensure_checkpoint

PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "added_tokens.json",
    "special_tokens_map.json",
]
CONVERTED = ("smollm2",)
"""Models that `make real-weights` puts into the cache (experiments/host/real_weights.py)."""


def fetch(name: str) -> Path:
    """Builds a preset, finds a converted model in the cache, or downloads what the engine reads of a
    hub id (no code, no pickles) into the hub's own cache. Raises FileNotFoundError, saying what to
    do instead.
    """
    if name in (presets := PRESETS | GENERATED):
        return ensure_checkpoint(name)
    if name in CONVERTED:
        if not (folder := cache_folder() / name).is_dir():
            raise FileNotFoundError(
                f"model {name!r} is not in {cache_folder()} yet: `make real-weights` in the repository fetches and converts it"
            )
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS))
    except (
        HFValidationError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise FileNotFoundError(
            f"model {name!r} is neither a folder here nor a hub id that can be fetched from here ({type(error).__name__}): "
            "give a folder with config.json and *.safetensors, or a preset, which needs no hub"
            f"{_suggestion(name, presets)}: {', '.join(presets)}"
        ) from error


def _suggestion(name: str, presets: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(presets), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
