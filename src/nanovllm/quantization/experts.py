"""A mixture of experts whose weights are quantized. Loaded with such a model."""

import torch
from torch import Tensor

from nanovllm.kernels.torch.activation import silu_and_mul
from nanovllm.quantization.weights import QuantizedWeight


def mix_experts(
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    *,
    some_elsewhere: bool = False,
) -> Tensor:
    """As kernels.torch.experts.mix_experts, with quantized weights of all experts: [experts, outputs, inputs] each.

    By the twins of the products, on every device. In a CUDA graph, which cannot wait to know what was chosen, every expert
    computes every token.
    """
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    numbers = range(len(gate_up.packed)) if capturing else chosen.unique().tolist()  # type: ignore[arg-type]
    total = torch.zeros_like(x)
    for number in numbers:
        if some_elsewhere and number >= len(gate_up.packed):  # type: ignore[arg-type]
            continue
        if capturing:
            tokens: Tensor | slice = slice(None)
            share = (shares * (chosen == number)).sum(1, keepdim=True)
        else:
            tokens, places = torch.where(chosen == number)
            share = shares[tokens, places, None]
        gated = silu_and_mul(gate_up.product(x[tokens], expert=number))
        total[tokens] += down.product(gated, expert=number) * share
    return total
