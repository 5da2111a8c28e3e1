"""Where the checkpoint of a plan lies on this machine, and whether it is the one the plan means. Standard library only.

A preset is built by the engine (`nanovllm.models.checkpoint`), which loads torch; that happens in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.environment import of_child

_BUILD = """
import json, sys
from nanovllm.models.checkpoint import checkpoint_digest, ensure_checkpoint
given = json.loads(sys.argv[1])
folder = given["path"] or ensure_checkpoint(given["preset"])
print(json.dumps({"path": str(folder), "digest": checkpoint_digest(folder)}))
"""
_SHAPE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip


class ModelError(Exception):
    """A checkpoint that is not there or not the one asked for; the message says what to do."""


def locate(model: dict[str, Any]) -> Path:
    """The folder of a plan's model; a preset is built if need be. Raises ModelError where its digest is not the plan's.

    A plan without a digest (null) takes a folder as it is.
    """
    if model["path"] is not None and model["digest"] is None:
        _check_folder(model["path"])
        return Path(model["path"])
    found = inspect(model["preset"], model["path"])
    if model["digest"] is not None and found["digest"] != model["digest"]:
        raise ModelError(
            f"the checkpoint in {found['path']} has digest {found['digest']}, the plan was made for {model['digest']}: "
            "other weights. Give the checkpoint of the plan, or make the plan again."
        )
    return Path(found["path"])


def inspect(preset: str | None, path: str | None) -> dict[str, Any]:
    """{"path", "digest"} of a preset (built if need be) or a folder. Raises ModelError."""
    if path is not None:
        _check_folder(path)
    given = json.dumps({"preset": preset, "path": path and str(Path(path).resolve())})
    done = subprocess.run([sys.executable, "-c", _BUILD, given], capture_output=True, text=True, env=of_child(), check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ModelError(f"model {preset or path}: cannot be prepared: {last[0]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def _check_folder(path: str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"model {path}: no folder with a config.json; give the folder of a checkpoint, or a preset")


def download(hub_id: str) -> Path:
    """The folder of a model of the Hugging Face hub, fetched if it is not in its cache. Raises ModelError."""
    script = (
        "import sys; from huggingface_hub import snapshot_download; "
        "print(snapshot_download(sys.argv[1], allow_patterns=['*.json', '*.safetensors', '*.txt', '*.jinja']))"
    )
    done = subprocess.run([sys.executable, "-c", script, hub_id], capture_output=True, text=True, env=of_child(), check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ModelError(f"model {hub_id}: neither a folder with a config.json nor to be had from the hub ({last[0]}); "
                         "give a folder, or a preset such as tiny")  # fmt: skip
    return Path(done.stdout.strip().splitlines()[-1])


def shape(folder: Path) -> dict[str, Any]:
    """The sizes of a checkpoint, from its config.json."""
    config = json.loads((folder / "config.json").read_text())
    found = {name: config[name] for name in _SHAPE if name in config}
    found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    return found
