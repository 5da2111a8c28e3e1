"""Where a model's files are: a folder, or a hub id. Loaded only when the name is not a folder."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "added_tokens.json",
    "special_tokens_map.json",
]


def fetch(hub_id: str) -> Path:
    """Downloads what the engine reads (no code, no pickles) into the hub's own cache. Raises
    FileNotFoundError, saying what to do instead.
    """
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=PATTERNS))
    except (
        HFValidationError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise FileNotFoundError(
            f"model {hub_id!r} is neither a folder here nor a hub id that can be fetched from here ({type(error).__name__}): "
            "give a folder with config.json and *.safetensors, or build one that needs no hub with "
            "`python -m nanovllm.models.checkpoint tiny`"
        ) from error
