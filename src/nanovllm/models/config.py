"""The shape of a model, read from its config.json without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = ("Qwen3ForCausalLM",)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """By the names of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool
    eos_token_ids: tuple[int, ...]
    dtype: str


def load_hf_config(folder: Path) -> ModelConfig:
    """Reads config.json, and the end-of-sequence ids of generation_config.json.

    Raises FileNotFoundError where there is none, ValueError for an architecture or a setting that this engine does not
    compute: a setting is never ignored.
    """
    raw = _read(folder / "config.json")
    if not set(raw.get("architectures") or ()) & set(SUPPORTED):
        raise ValueError(f"{folder} has architectures={raw.get('architectures')}; this engine computes {', '.join(SUPPORTED)}")
    _refuse(folder, raw, "hidden_act", {"silu"})
    _refuse(folder, raw, "use_sliding_window", {False, None})
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{folder} has layer_types={sorted(set(raw['layer_types']))}; this engine computes full_attention")
    eos = raw.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = _read(generation).get("eos_token_id", eos)
    try:
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            max_position_embeddings=raw["max_position_embeddings"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=_rope_theta(folder, raw),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
        )
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error.args[0]!r}") from error


def _rope_theta(folder: Path, raw: dict[str, Any]) -> float:
    """transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{folder} has rope type {kind!r}; this engine computes 'default'")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{folder / 'config.json'} lacks rope_theta, in rope_parameters or beside it")
    return float(theta)


def _refuse(folder: Path, raw: dict[str, Any], name: str, allowed: set[Any]) -> None:
    if name in raw and raw[name] not in allowed:
        raise ValueError(f"{folder} has {name}={raw[name]!r}; this engine computes {sorted(map(str, allowed))}")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give a folder with config.json and *.safetensors, or a hub id")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
