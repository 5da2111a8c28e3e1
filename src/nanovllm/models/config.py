"""The shape of a model, read from its config.json without transformers."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPUTED: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "use_sliding_window": False,
                            "rope type": "default", "layer_types": ["full_attention"]}  # fmt: skip
"""What this engine computes. Any other value is an error: a setting is never ignored."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """By the names of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    head_dim: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()


def load_hf_config(folder: Path) -> ModelConfig:
    """Reads config.json, and the end-of-sequence ids of generation_config.json, as transformers 4 and 5 write them.

    Raises FileNotFoundError where there is none, ValueError for what this engine does not compute and what is missing.
    """
    raw = _read(folder / "config.json")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, transformers 4
    layer_types = sorted(set(raw.get("layer_types") or COMPUTED["layer_types"]))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    found = {"architectures": "none", **raw, "layer_types": layer_types, "rope type": rope_type}
    for name, computed in COMPUTED.items():
        if found.get(name, computed) not in (computed, None):
            raise ValueError(f"{folder} has {name}={found[name]!r}; this engine computes {computed!r} only")
    generation = folder / "generation_config.json"
    eos = (_read(generation) if generation.is_file() else {}).get("eos_token_id", raw.get("eos_token_id"))
    found |= {
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta")),
        "head_dim": raw.get("head_dim") or raw.get("hidden_size", 0) // raw.get("num_attention_heads", 1),
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    }
    fields = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    if lacking := [name for name, default in fields.items() if default is dataclasses.MISSING and found.get(name) is None]:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(lacking)}")
    return ModelConfig(**{name: found[name] for name in fields if found.get(name) is not None})


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give a folder with config.json and *.safetensors, or a hub id")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
