"""RMSNorm with a weight."""

from torch import Tensor, nn

from nanovllm.kernels.registry import Kernels
from nanovllm.layers.linear import parameter


class RMSNorm(nn.Module):
    """forward(x) -> the norm of x. add(x, residual) -> (norm of their sum, the sum). x: [...,
    size].
    """

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels
        self.weight = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
