"""Ways of rounding a model, and of rounding it wrongly, that a price has to tell apart.

Each function changes a loaded HF model in place. The errors are those that quantized engines have
had: a scale that is a little off, an outlier channel that is lost, weights beyond what the scale can
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gate.reference_model import last_hidden_states
from experiments.gate.rescoring import Mutation
from experiments.price.measure import STEP_TOKENS, ReadPrompt


def linear_layers(model: Any) -> Iterator[nn.Linear]:
    """Those of the decoder layers, which recipes quantize; embeddings and the output layer stay."""
    for layer in model.base_model.layers:
        yield from (module for module in layer.modules() if isinstance(module, nn.Linear))


@torch.no_grad()
def round_weights(model: Any, bits: int = 8, group: int | None = None) -> None:
    """Rounds the weights of every linear layer to the nearest of 2^bits - 1 levels, symmetric about
    zero, with a scale for each output channel, or for each `group` of its input channels.
    """
    most = 2 ** (bits - 1) - 1
    for linear in linear_layers(model):
        weight = linear.weight
        parts = weight.unflatten(1, (-1, group or weight.shape[1]))
        scale = parts.abs().amax(-1, keepdim=True) / most
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        weight.copy_(((parts / scale).round() * scale).flatten(1))


@torch.no_grad()
def scale_layer(model: Any, factor: float = 1.02) -> None:
    """Multiplies what the middle decoder layer adds to the residual stream by `factor`: the scales of
    its two output projections are off.
    """
    layer = _middle(model)
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.mul_(factor)


@torch.no_grad()
def drop_channel(model: Any) -> None:
    """Loses the input channel of the middle layer's last projection that has the largest weights."""
    weight = _middle(model).mlp.down_proj.weight
    weight[:, weight.norm(dim=0).argmax()] = 0


@torch.no_grad()
def saturate(model: Any, share: float = 0.5) -> None:
    """Cuts the weights of the middle layer at `share` of their channel's largest one, as a scale that
    is too small does.
    """
    for linear in (module for module in _middle(model).modules() if isinstance(module, nn.Linear)):
        most = share * linear.weight.abs().amax(1, keepdim=True)
        linear.weight.copy_(linear.weight.clamp(-most, most))


ERRORS: dict[str, Mutation] = {
    "a layer's scale 2 % off": scale_layer,
    "one channel dropped": drop_channel,
    "saturation": saturate,
}


def reader_of(model: Any) -> ReadPrompt:
    """A model as the engine of a price: reads a prompt, and hands over logits a few at a time."""

    @torch.inference_mode()
    def read(token_ids: list[int], take: Callable[[Tensor], None]) -> None:
        ids = torch.tensor([token_ids[:-1]], device=model.device)
        for hidden in last_hidden_states(model, ids)[0].split(STEP_TOKENS):
            take(model.get_output_embeddings()(hidden))

    return read


def _middle(model: Any) -> Any:
    layers = model.base_model.layers
    return layers[len(layers) // 2]
