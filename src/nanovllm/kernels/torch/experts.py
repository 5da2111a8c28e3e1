"""A mixture of experts: each token goes through a few of many MLPs (Shazeer et al., 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.torch.activation import silu_and_mul


def mix_experts(
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    some_elsewhere: bool = False,
) -> Tensor:
    """x: [tokens, hidden]; shares, chosen: [tokens, top_k], what each chosen expert counts and its number;
    gate_up: [experts, 2 * size, hidden], gate first; down: [experts, hidden, size]. some_elsewhere: a number
    above the last one is an expert that another rank computes, and counts nothing here.

    Returns the sum of the chosen experts' results times their shares: [tokens, hidden]. Waits for the
    device, to know which experts have tokens; in a CUDA graph, where it cannot, every expert computes
    every token.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return mix_every_expert(x, shares, chosen, gate_up, down)
    total = torch.zeros_like(x)
    for number in chosen.unique().tolist():
        if some_elsewhere and number >= len(down):
            continue
        tokens, places = torch.where(chosen == number)
        result = F.linear(silu_and_mul(F.linear(x[tokens], gate_up[number])), down[number])
        total.index_add_(0, tokens, result * shares[tokens, places, None])
    return total


def mix_every_expert(
    x: Tensor, shares: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """mix_experts with the same operations whatever was chosen, as a CUDA graph records them: a token
    counts the result of an expert that it did not choose with a share of 0. That is `experts / top_k`
    times the work.
    """
    total = torch.zeros_like(x)
    for number, (up, back) in enumerate(zip(gate_up, down, strict=True)):
        share = (shares * (chosen == number)).sum(1, keepdim=True)
        total += F.linear(silu_and_mul(F.linear(x, up)), back) * share
    return total
