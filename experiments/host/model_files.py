"""Finds the checkpoint of a plan on this machine and compares its digest. Standard library only.

A preset is built by the engine (`nanovllm.models.checkpoint`), which needs torch, in a separate
process.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

from experiments.host import real_weights
from experiments.host.environment import for_subprocess
from experiments.records.types import ModelFiles, ModelShape, PlannedModel
from nanovllm import host_limits

GENERATED = (
    "qwen3-8b",
    "qwen3-32b",
    "llama-3.1-8b",
    "qwen3-8b-4-layers",
    "qwen3-32b-4-layers",
    "llama-3.1-8b-4-layers",
)
"""Presets whose weights are no files (nanovllm.models.generated)."""
PRESETS = (
    "tiny",
    "qwen3-0.6b",
    "tiny-qwen2",
    "tiny-llama",
    "tiny-mistral",
    "tiny-qwen3-moe",
    *GENERATED,
    real_weights.NAME,
)
"""The names of nanovllm.models.checkpoint, which cannot be imported here, as it needs torch, and the trained model."""
_PREPARE = (
    "import json, sys; from experiments.host.model_files import prepare; "
    "print(json.dumps(prepare(*json.loads(sys.argv[1]))))"
)
_SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)


class ModelError(Exception):
    """A checkpoint that is missing or not the requested one; the message says what to do."""


def locate(model: PlannedModel, *, here: bool = False) -> Path:
    """The folder of a plan's model; builds a preset that is not in the cache yet. Raises ModelError
    if its digest is not the plan's. A plan without a digest accepts any folder. here: see `inspect`.
    """
    if model["path"] is not None and model["digest"] is None:
        _check_folder(model["path"])
        return Path(model["path"])
    found = inspect(model["preset"], model["path"], here=here)
    if model["digest"] is not None and found["digest"] != model["digest"]:
        raise ModelError(
            f"the checkpoint in {found['path']} has digest {found['digest']}, but the plan was made for {model['digest']}. "
            "Use the plan's checkpoint, or make the plan again."
        )
    return Path(found["path"])


def inspect(preset: str | None, path: str | None, *, here: bool = False) -> ModelFiles:
    """The path and digest of a preset (built if necessary) or a folder. Raises ModelError.

    The digest is cached until a file changes. here: compute it in this process, which has imported
    torch anyway. A runner must not do that: torch might open the GPU that its launches use.
    """
    found, state = _inspect(preset, path, here)
    if state_of(Path(found["path"])) != state:
        _inspect.cache_clear()
        found, _ = _inspect(preset, path, here)
    return found


@functools.lru_cache(maxsize=16)
def _inspect(
    preset: str | None, path: str | None, here: bool
) -> tuple[ModelFiles, list[tuple[str, int, int]]]:
    """The same, with the state of the files that were digested."""
    if path is not None:
        _check_folder(path)
    before = state_of(Path(path)) if path is not None else None
    if preset == real_weights.NAME:
        preset, path = None, str(_converted())
    if preset is not None and sys.stderr.isatty():
        print(
            f"preparing checkpoint {preset} (takes up to a minute the first time)",
            file=sys.stderr,
            flush=True,
        )
    given = (preset, path and str(Path(path).resolve()))
    if here:  # importing torch in another process would take longer than the rest
        try:
            found = prepare(*given)
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(
                f"model {preset or path}: cannot be prepared: {type(error).__name__}: {error}"
            ) from error
    else:
        command = [sys.executable, "-c", _PREPARE, json.dumps(given)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=for_subprocess(), check=False
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise ModelError(f"model {preset or path}: cannot be prepared: {last[0]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
    return found, before or state_of(Path(found["path"]))


def prepare(preset: str | None, path: str | None) -> ModelFiles:
    """Builds a preset and computes the digest, with the engine's code, which imports torch."""
    from nanovllm.models.checkpoint import checkpoint_digest, ensure_checkpoint

    folder = path or ensure_checkpoint(str(preset))
    return {"path": str(folder), "digest": checkpoint_digest(folder)}


def preset_digests() -> dict[str, str]:
    """The digest that a preset's checkpoint has today, for each whose weights are files."""
    file = Path(host_limits.__file__).parent / "models" / "digests.json"
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _converted() -> Path:
    try:
        return real_weights.find()
    except real_weights.RealWeightsError as error:
        raise ModelError(str(error)) from error


def state_of(model: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of a checkpoint's files, to detect changes."""
    found = ((path.name, path.stat()) for path in sorted(model.glob("*")))
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _check_folder(path: str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise ModelError(
            f"model {path}: not a folder with a config.json; give the folder of a checkpoint, or a preset"
        )


def download(hub_id: str) -> Path:
    """The local folder of a model of the Hugging Face Hub, downloaded if necessary. Raises
    ModelError.
    """
    script = (
        "import sys; from huggingface_hub import snapshot_download; "
        "print(snapshot_download(sys.argv[1], allow_patterns=['*.json', '*.safetensors', '*.txt', '*.jinja']))"
    )
    try:
        return Path(last_line_of(script, hub_id))
    except ModelError as error:
        raise ModelError(
            f"model {hub_id}: not a folder with a config.json, and the download from the Hugging Face Hub failed ({error}); "
            "give a folder, or a preset such as tiny"
        ) from error


def last_line_of(script: str, *arguments: str, given: str | None = None) -> str:
    """What a script prints last, run in another Python process with `given` as its input. Raises
    ModelError with the last line of its errors.
    """
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=given,
        capture_output=True,
        text=True,
        env=for_subprocess(),
        check=False,
    )
    if done.returncode != 0:
        raise ModelError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.strip().splitlines()[-1]


def shape(folder: Path) -> ModelShape:
    """The sizes of a checkpoint, from its config.json."""
    config = json.loads((folder / "config.json").read_text())
    if "num_local_experts" in config:  # transformers 5's name
        config["num_experts"] = config["num_local_experts"]
    found: ModelShape = {name: config[name] for name in _SHAPE if name in config}  # type: ignore[assignment]
    found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    return found
