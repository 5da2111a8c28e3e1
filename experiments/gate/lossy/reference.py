"""Makes an HF model round what a quantized engine rounds: the definition of each recipe, written from its description and not
from the engine's code.

Scales and steps are calculated in float32 from the checkpoint's weights in the engine's dtype, as the engine's definition says;
what they stand for is then computed in the precision of the model that holds them. Activations are rounded in the model's own
precision, so a value in the middle between two steps may fall to either side: HF in the engine's dtype shows how often.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from experiments.gate.lossy.recipe import Recipe

GROUP = 128
E4M3_LARGEST = 448.0


def make_lossy(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """Replaces weights by what is left of them, and rounds in forward passes, as `recipe` says. dtype: the engine's, to which the
    model's weights have been rounded before.
    """
    if recipe.quantization != "none":
        round_weights(model, recipe.quantization, dtype)
    if recipe.kv_cache_dtype != "auto":
        round_kv(model)


def round_kv(model: Any) -> None:
    """Keys, as they are when they have been rotated, and values in e4m3, with the scale 1.0."""
    name = "sdpa_of_e4m3"
    ALL_ATTENTION_FUNCTIONS.register(name, attend_to_rounded)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = name


def attend_to_rounded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
) -> Any:
    """transformers' attention function: query [batch, heads, tokens, head_dim], the others with kv_heads."""
    return sdpa_attention_forward(
        module, query, rounded_to_e4m3(key), rounded_to_e4m3(value), *rest, **named
    )


def round_weights(model: Any, level: str, dtype: torch.dtype) -> None:
    """Of every projection; not of embeddings, the head, norms, biases and routers."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weights = [module.weight]
            if level == "fp8":
                module.forward = types.MethodType(rounding_linear, module)
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            weights = [module.gate_up_proj, module.down_proj]  # of all experts
            if level == "fp8":
                module.forward = types.MethodType(rounding_experts, module)
        else:
            continue
        for weight in weights:
            weight.data.copy_(dequantized(weight.data, level, dtype))


def dequantized(weight: Tensor, level: str, dtype: torch.dtype) -> Tensor:
    """weight: [..., outputs, inputs] in any precision that holds its values -> what it becomes, in float64.

    int8: steps -127 to 127 of the largest magnitude of an output's weights / 127. int4: in each group of 128 inputs, 16 steps from
    min(0, least) to max(0, largest), of which one is exactly 0. fp8: e4m3 of weights / (largest magnitude / 448).
    """
    exact = weight.float()
    if level == "int4":
        parts = [_int4(part, dtype) for part in exact.split(GROUP, dim=-1)]
        return torch.cat(parts, dim=-1)
    largest = exact.abs().max(dim=-1, keepdim=True).values
    if level == "int8":
        scale = _stored(largest / 127, dtype)
        return (exact / scale).round().clamp(-127, 127).double() * scale.double()
    scale = _stored(largest / E4M3_LARGEST, torch.float32)
    return rounded_to_e4m3(exact / scale).double() * scale.double()


def _int4(group: Tensor, dtype: torch.dtype) -> Tensor:
    least = group.min(dim=-1, keepdim=True).values.clamp(max=0)
    largest = group.max(dim=-1, keepdim=True).values.clamp(min=0)
    scale = _stored((largest - least) / 15, dtype)
    zero = (-least / scale).round().clamp(0, 15)
    steps = ((group / scale).round() + zero).clamp(0, 15)
    return (steps - zero).double() * scale.double()


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as the engine keeps it, in float32; 1 where all weights are 0."""
    kept = scale.to(dtype).float()
    return torch.where(kept == 0, 1.0, kept)


def rounded_to_e4m3(values: Tensor) -> Tensor:
    """The nearest number with a sign, 4 bits of exponent and 3 of mantissa (Micikevicius et al., 2022, FP8 formats for deep
    learning); ties go to the even one, and what is larger than 448 becomes 448. In the dtype of `values`.
    """
    wide = _wide(values)
    _, exponent = torch.frexp(wide)  # wide = m * 2^exponent, m in [1/2, 1)
    step = torch.ldexp(torch.ones_like(wide), (exponent - 4).clamp(min=-9))
    nearest = (wide / step).round() * step
    return nearest.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(values.dtype)


def rounded_activations(x: Tensor) -> Tensor:
    """x: [..., inputs] -> each token's values in e4m3, scaled so that its largest magnitude becomes 448."""
    wide = _wide(x)
    scale = wide.abs().amax(-1, keepdim=True) / E4M3_LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    return (rounded_to_e4m3(wide / scale) * scale).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32 or float64."""
    return x if x.dtype == torch.float64 else x.float()


def rounding_linear(self: Any, x: Tensor) -> Tensor:
    """nn.Linear.forward of W8A8."""
    return nn.functional.linear(rounded_activations(x), self.weight, self.bias)


def rounding_experts(self: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Qwen3MoeExperts.forward of W8A8. x: [tokens, hidden]; chosen, shares: [tokens, top_k]."""
    total = torch.zeros_like(x)
    for number in range(self.num_experts):
        tokens, places = torch.where(chosen == number)
        gate, up = nn.functional.linear(
            rounded_activations(x[tokens]), self.gate_up_proj[number]
        ).chunk(2, dim=-1)
        hidden = rounded_activations(self.act_fn(gate) * up)
        result = nn.functional.linear(hidden, self.down_proj[number])
        total.index_add_(0, tokens, (result * shares[tokens, places, None]).to(total.dtype))
    return total
