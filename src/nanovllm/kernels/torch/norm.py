"""RMSNorm (Zhang and Sennrich, 2019), in float32 as Qwen3 defines it."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., n], weight: [n] -> [..., n] in x's dtype, a new tensor."""
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual), both new: neither input is written to."""
    total = x + residual
    return rms_norm(total, weight, eps), total
