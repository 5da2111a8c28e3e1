"""The sizes of the presets, so that a prediction builds no checkpoint (a test compares them with
nanovllm.models.checkpoint, which needs torch).
"""

from __future__ import annotations

from experiments.host import model_files
from experiments.records.types import ModelShape, PlannedModel
from experiments.study.spec import ModelChoice

_QWEN3_06B: ModelShape = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
_QWEN3_8B: ModelShape = {
    **_QWEN3_06B,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12_288,
    "tie_word_embeddings": False,
}
_QWEN3_32B: ModelShape = {
    **_QWEN3_8B,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 25_600,
}
_LLAMA_8B: ModelShape = {
    **_QWEN3_8B,
    "num_hidden_layers": 32,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
}
SHAPES: dict[str, ModelShape] = {
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
    "qwen3-0.6b": _QWEN3_06B,
    "qwen3-8b": _QWEN3_8B,
    "qwen3-32b": _QWEN3_32B,
    "llama-3.1-8b": _LLAMA_8B,
    "qwen3-8b-4-layers": {**_QWEN3_8B, "num_hidden_layers": 4},
    "qwen3-32b-4-layers": {**_QWEN3_32B, "num_hidden_layers": 4},
    "llama-3.1-8b-4-layers": {**_LLAMA_8B, "num_hidden_layers": 4},
}


def planned(choice: ModelChoice) -> PlannedModel:
    """The `model` part of a plan. A preset's sizes are those above; those of other checkpoints are
    read from their folder. No digest: nothing is run.
    """
    if choice.preset in SHAPES:
        return {
            "preset": choice.preset,
            "path": None,
            "dtype": choice.dtype,
            "digest": None,
            "shape": SHAPES[choice.preset],
        }
    from pathlib import Path

    path = choice.path or model_files.inspect(choice.preset, None)["path"]
    return {
        "preset": choice.preset,
        "path": None if choice.preset else path,
        "dtype": choice.dtype,
        "digest": None,
        "shape": model_files.shape(Path(path)),
    }
