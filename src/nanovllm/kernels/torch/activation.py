"""SwiGLU's gate (Shazeer, 2020)."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [tokens, 2 * n], gate first -> silu(gate) * up: [tokens, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_silu_and_mul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [tokens, k], weight: [2 * n, k], gate first -> silu(gate) * up: [tokens, n]."""
    return silu_and_mul(F.linear(x, weight, bias))
