"""Cosines and sines of the rotary position embedding (Su et al., 2021)."""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Looks up positions in a float32 table [max_model_len, head_dim]: cosines first, then sines."""

    table: Tensor

    def __init__(self, head_dim: int, max_model_len: int, theta: float) -> None:
        super().__init__()
        inverse_frequency = theta ** -(
            torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").double() / head_dim
        )
        angles = torch.arange(max_model_len, device="cpu").double()[:, None] * inverse_frequency
        self.register_buffer(
            "table", torch.cat((angles.cos(), angles.sin()), dim=-1).float(), persistent=False
        )

    def forward(self, positions: Tensor) -> Tensor:
        """[tokens] -> [tokens, head_dim]."""
        return self.table[positions]
