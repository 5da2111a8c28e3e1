"""The shape of a model, read from its config.json without transformers."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.models.families import FAMILIES

# What every family here computes. Any other value is an error: a setting is never ignored
# (docs/checkpoints.md lists them all).
COMPUTED: dict[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "layer_types": ["full_attention"],
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "mrope_section": "none",
    "dual_chunk_attention_config": "none",
    "quantization_config": "none",
    "compression_config": "none",
}

# What else an error says of a setting, or of the end of an architecture's name.
HINTS = {
    "quantization_config": ": the checkpoint is quantized, and this engine reads float32, bfloat16 and float16 weights; take the "
    "original, unquantized checkpoint",
    "compression_config": ": the checkpoint is compressed; take the original, uncompressed one",
    "Model": ". A model without a language modelling head makes embeddings, no text",
    "ForSequenceClassification": ". It classifies or ranks texts and generates none",
    "ForTokenClassification": ". It classifies tokens and generates no text",
    "ForConditionalGeneration": ". It reads images or sound; only text models are computed here",
}

# What a value of each type must be.
KINDS: dict[Any, tuple[str, Any]] = {
    int: ("a whole number, 1 or more", lambda value: type(value) is int and value >= 1),
    float: ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a name", lambda value: type(value) is str),
    Any: ("made by rope_scaling.py", callable),
    dict[str, Any]: ("settings", lambda value: type(value) is dict),
    tuple[int, ...]: (
        "token ids, whole numbers",
        lambda value: all(type(token) is int and token >= 0 for token in value),
    ),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Named as in config.json; architecture is a key of families.FAMILIES."""

    architecture: str
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
    own: dict[str, Any] = dataclasses.field(default_factory=dict)  # of this family alone
    scaled_rope: Any = None  # of layers/rope_scaling.py, where rope_type is not 'default'


def load_hf_config(folder: Path) -> ModelConfig:
    """Reads config.json, and the end-of-sequence ids of generation_config.json, as transformers 4
    and 5 write them.

    Raises FileNotFoundError where config.json is missing; ValueError for settings that this engine
    does not compute, missing settings, and values of another type.
    """
    raw = read_json(folder / "config.json")
    # transformers 4, transformers 5; where both are given, HF takes the former
    rope = (
        given
        if isinstance(given := raw.get("rope_scaling") or raw.get("rope_parameters") or {}, dict)
        else {"rope_type": given}
    )
    eos = read_if_there(folder / "generation_config.json").get(
        "eos_token_id", raw.get("eos_token_id")
    )
    named = raw.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in FAMILIES:
        raise ValueError(
            f"{folder} has architectures={named!r}; this engine computes {', '.join(FAMILIES)} "
            "(models/families.py says how to add one)"
            + "".join(hint for end, hint in HINTS.items() if str(named).endswith(end + "']"))
        )
    found = {
        "architecture": named[0],
        **rope,
        **raw,
        "layer_types": sorted(set(map(str, raw.get("layer_types") or COMPUTED["layer_types"]))),
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta")),
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "scaled_rope": None,
        "own": {name: raw[name] for name in FAMILIES[named[0]][2:] if raw.get(name) is not None},
    }
    for name, computed in (COMPUTED | FAMILIES[found["architecture"]][1]).items():
        if (there := found.get(name, "nothing" if computed is None else computed)) not in (
            computed,
            None,
        ):
            raise ValueError(
                f"{folder} has {name}={there!r}; {found['architecture']} is computed here with {computed!r} "
                f"only{HINTS.get(name, '')}"
            )
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", None):
        from nanovllm.layers.rope_scaling import read_scaled_rope

        found |= read_scaled_rope(rope, raw, folder)
    fields = {f.name: f for f in dataclasses.fields(ModelConfig)}
    values = {name: found[name] for name in fields if found.get(name) is not None}
    if lacking := [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and name != "head_dim"
    ]:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(lacking)}")
    for name, value in values.items():
        allowed, fits = KINDS[fields[name].type]
        if not fits(value):
            raise ValueError(
                f"{folder} has {name.replace('_ids', '_id')}={value!r}; it must be {allowed}"
            )
    return ModelConfig(
        **{"head_dim": values["hidden_size"] // values["num_attention_heads"], **values}
    )


def read_json(file: Path) -> dict[str, Any]:
    """The keys and values of a JSON file. Raises FileNotFoundError, or ValueError for a file of
    another kind.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: give a folder with config.json and *.safetensors, or a hub id"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} is not JSON of keys and values; it holds a {type(content).__name__}"
        )
    return content


def read_if_there(file: Path) -> dict[str, Any]:
    """Like read_json; {} where the file is missing."""
    return read_json(file) if file.is_file() else {}
