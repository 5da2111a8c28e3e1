"""Turns an HF model into a reference: exact norms and rotary angles, and logits that can be computed
a few rows at a time.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from nanovllm.layers.rope_scaling import read_scaled_rope


def make_exact(model: Any) -> None:
    """Makes a model compute RMS norms and a router's shares in its own precision, and rotary angles in
    float64. HF computes all of them in float32, whatever the model's dtype.

    Otherwise the reference of a float32 engine would be as noisy as the engine, and HF's rounding
    of angles (1e-7 times the position, in radians) would be taken as exact: an engine with more
    accurate angles would fail at long contexts.
    """

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def router(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        shares, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            shares = shares / shares.sum(-1, keepdim=True)
        return logits, shares, experts

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (
            angles.sin() * self.attention_scaling
        ).to(x.dtype)

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    embedding = getattr(model.base_model, "rotary_emb", None)
    if not norms or embedding is None:
        raise NotImplementedError(
            f"the gate cannot make an exact reference of {type(model).__name__}: it needs RMS norms and rotary embeddings, "
            "as in Qwen3"
        )
    for module in norms:
        module.forward = types.MethodType(norm, module)
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.forward = types.MethodType(router, module)
            # its other implementations of experts multiply no matrices of float64
            model.set_experts_implementation("eager")
    embedding.inv_freq = exact_frequencies(model, embedding)
    embedding.forward = types.MethodType(rotary, embedding)


def exact_frequencies(model: Any, embedding: Any) -> Tensor:
    """The rotary frequencies of a model in float64: [head_dim / 2].

    Those of a scaled rope are the engine's, and only if HF's are the same up to rounding to
    float32: HF alone decides what they are. Raises NotImplementedError if they are not.
    """
    rope, half = model.config.rope_parameters, len(embedding.inv_freq)
    exponents = torch.arange(half, dtype=torch.float64, device=embedding.inv_freq.device) / half
    # Su et al., 2021, RoFormer, eq. 15
    frequencies, amplitude = rope["rope_theta"] ** -exponents, 1.0
    if embedding.rope_type != "default":
        decided = read_scaled_rope(rope, model.config.to_dict(), type(model).__name__)
        frequencies, amplitude = decided["scaled_rope"](frequencies, rope["rope_theta"])
    same = torch.allclose(frequencies, embedding.inv_freq.double(), rtol=1e-5, atol=0.0)
    if not same or abs(amplitude - embedding.attention_scaling) > 1e-6:
        raise NotImplementedError(
            f"the gate cannot make an exact reference of {type(model).__name__}: its rotary frequencies with {rope} are not "
            "those that this engine computes"
        )
    return frequencies


def check_decomposition(model: Any) -> None:
    """Raises NotImplementedError unless logits are the LM head applied to the last hidden states
    (some architectures scale or cap them).
    """
    ids = torch.arange(8, device=model.device)[None]
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        ours = model.get_output_embeddings()(last_hidden_states(model, ids))
    if not torch.equal(whole, ours):
        raise NotImplementedError(
            f"the gate cannot rescore {type(model).__name__}: its logits are not lm_head(last hidden state), as they are for "
            "Qwen3ForCausalLM"
        )


def last_hidden_states(model: Any, ids: Tensor) -> Tensor:
    """[batch, length, hidden_size] after the final norm, from right-padded token ids [batch,
    length].
    """
    states: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states
