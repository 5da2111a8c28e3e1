"""Cosines and sines of the rotary position embedding (Su et al., 2021)."""

import torch
from torch import Tensor, nn

from nanovllm.kernels.registry import Operation


class RotaryEmbedding(nn.Module):
    """Looks up positions in a float32 table [max_model_len, head_dim]: cosines first, then sines.

    scaled: of rope_scaling.py, for a model whose context was extended.
    """

    def __init__(
        self, head_dim: int, max_model_len: int, theta: float, scaled: Operation | None = None
    ) -> None:
        super().__init__()
        frequencies = theta ** -(
            torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").double() / head_dim
        )
        frequencies, amplitude = scaled(frequencies, theta) if scaled else (frequencies, 1.0)
        angles = torch.arange(max_model_len, device="cpu").double()[:, None] * frequencies
        self.register_buffer(
            "table",
            (torch.cat((angles.cos(), angles.sin()), dim=-1) * amplitude).float(),
            persistent=False,
        )

    def forward(self, positions: Tensor) -> Tensor:
        """[tokens] -> [tokens, head_dim]."""
        return self.table[positions]
