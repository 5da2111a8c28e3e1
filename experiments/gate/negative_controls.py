"""Ways of breaking a model or its tokens that the gate must detect.

Each mutation changes a loaded HF model in place. They are errors that real engines have had, and
that leave the generated text plausible.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from experiments.gate.rescoring import Mutation, Rescorer
from experiments.gate.rules import GateParams, judge
from experiments.records.types import Request

CONTROL_PROMPT = 48


def scale_rope_theta(model: Any, factor: float = 1.1) -> None:
    """Multiplies rope_theta by `factor`: the inverse frequencies theta^(-2i/d) change by
    factor^(-2i/d).
    """
    inv_freq = model.base_model.rotary_emb.inv_freq
    exponents = torch.arange(len(inv_freq), device=inv_freq.device) / len(inv_freq)
    with torch.no_grad():
        inv_freq.mul_(factor**-exponents)


def change_norm_epsilon(
    model: Any, layer: int | None = None, norm: str = "input_layernorm", epsilon: float = 1e-3
) -> None:
    """Changes the epsilon of one norm in one layer (by default the middle one)."""
    layers = model.base_model.layers
    block = layers[len(layers) // 2 if layer is None else layer]
    getattr(
        block if norm.endswith("layernorm") else block.self_attn, norm
    ).variance_epsilon = epsilon


def swap_kv_slots(model: Any, layer: int | None = None, first: int = 0, second: int = 1) -> None:
    """Swaps the keys and values of two positions in the KV cache of one layer (by default the middle
    one).

    Keys are swapped before the rotary embedding, so that each token gets the position of the other.
    (Afterwards a swap would have no effect: attention is a sum over positions.)
    """
    layers = model.base_model.layers
    attention = layers[len(layers) // 2 if layer is None else layer].self_attn

    def swap(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] <= second:
            return output  # the sequence is too short to hold both
        output = output.clone()
        output[:, [first, second]] = output[:, [second, first]]
        return output

    for name in ("k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(swap)


def controls(prompt_tokens: int) -> dict[str, Mutation]:
    """All mutations by name, for prompts of at least this length. The swapped KV slots are the last
    ones that all prompts have, because positions far back get little attention.
    """
    end = max(2, prompt_tokens)
    return {
        "rope_theta 10 % off": scale_rope_theta,
        "epsilon 1e-3 in one layer's norm": change_norm_epsilon,
        "one KV slot of one layer swapped": partial(swap_kv_slots, first=end - 2, second=end - 1),
    }


def tamper(
    rescorer: Rescorer,
    requests: Sequence[Request],
    outputs: Sequence[Sequence[int]],
    params: GateParams,
) -> tuple[str, list[list[int]]]:
    """(what was done, outputs with one token replaced by the reference's second choice, where that
    is out of the bound).

    The last position that qualifies is taken, so that as little as possible of what follows
    changes.
    """
    scores = rescorer.score(requests, outputs)
    bound = judge(scores, rescorer.dtype, params).bound
    for request in reversed(range(len(outputs))):
        s = scores[request]
        gap = (s.best_scores[:, 0] - s.best_scores[:, 1]) * (
            requests[request]["temperature"] or 1.0
        )
        wide = (s.agrees & (gap > 2 * bound)).nonzero().flatten()
        if len(wide):
            position = int(wide[-1])
            tampered = [list(output) for output in outputs]
            tampered[request][position] = int(s.best[position, 1])
            return f"second choice at request {request}, position {position}", tampered
    raise ValueError(
        f"no token of {len(outputs)} outputs is farther than {2 * bound:.3g} logits from the second choice"
    )
