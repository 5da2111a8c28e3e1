"""The model families of this engine. To add one, write its file and add its row to FAMILIES.

A row names the architecture as config.json does, the module that holds a class of that name, and the settings that
config.json must have (they may replace a value of models.config.COMPUTED): the value, null or no such key; None means
that the key must be there, as null. Names behind them are settings that the family alone has; its class finds them in
ModelConfig.own. The module is loaded only when a checkpoint asks for it. The class is made with

    (config: ModelConfig, max_model_len: int, kernels: Kernels, attention: Attention, tp: TensorParallel)

and has

    packed_modules_mapping          name of a checkpoint's module -> (fused module, its part)
    __call__(batch, kv_caches)      ForwardBatch, [(keys, values) per layer] -> hidden states [tokens, hidden]
    logits(hidden)                  [rows, hidden] -> [rows, this rank's part of the vocabulary]
"""

from importlib import import_module
from typing import Any

# architecture -> (module, settings of config.json that this family computes, beside models.config.COMPUTED, *own ones)
FAMILIES: dict[str, tuple[Any, ...]] = {
    "Qwen3ForCausalLM": ("nanovllm.models.qwen3", {"model_type": "qwen3"}),
    "Qwen3MoeForCausalLM": (
        "nanovllm.models.qwen3_moe",
        {"model_type": "qwen3_moe"},
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    ),
    "Qwen2ForCausalLM": ("nanovllm.models.qwen2", {"model_type": "qwen2", "attention_bias": True}),
    # vLLM acts on bias and qkv_bias, HF does not
    "LlamaForCausalLM": (
        "nanovllm.models.llama",
        {"model_type": "llama", "mlp_bias": False, "bias": False, "qkv_bias": False},
    ),
    # a window that is not named is one of 4,096 tokens
    "MistralForCausalLM": (
        "nanovllm.models.mistral",
        {
            "model_type": "mistral",
            "sliding_window": None,
            "attention_bias": False,
            "mlp_bias": False,
            "bias": False,
            "qkv_bias": False,
        },
    ),
}


def model_class(architecture: str) -> Any:
    """The class that computes an architecture of FAMILIES."""
    return getattr(import_module(FAMILIES[architecture][0]), architecture)
