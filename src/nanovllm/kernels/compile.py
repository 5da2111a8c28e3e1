"""kernels=compile: torch.compile applied to each operation, here and nowhere else.

Batch sizes are symbolic, so one compilation serves every step. The sampler is not compiled: its
random numbers are defined operation by operation in IEEE arithmetic, and a compiler that contracts
a multiplication and an addition changes their bits.
"""

from typing import Any as _Any

import torch as _torch
from torch import Tensor as _Tensor

from nanovllm.kernels import torch as _oracle

_compile = _torch.compile(dynamic=True, fullgraph=True)

linear = _oracle.linear
rms_norm = _compile(_oracle.rms_norm)
add_rms_norm = _compile(_oracle.add_rms_norm)
qk_norm_rope_store_kv = _compile(_oracle.qk_norm_rope_store_kv)
silu_and_mul = _compile(_oracle.silu_and_mul)
sample = _oracle.sample


def linear_silu_and_mul(x: _Tensor, weight: _Tensor, bias: _Tensor | None = None) -> _Tensor:
    """The matmul is the library's; what follows it is compiled."""
    return silu_and_mul(linear(x, weight, bias))


def linear_qk_norm_rope_store_kv(
    x: _Tensor, weight: _Tensor, bias: _Tensor | None, *rest: _Any
) -> tuple[_Tensor, _Tensor, _Tensor]:
    """The matmul is the library's; what follows it is compiled."""
    return qk_norm_rope_store_kv(linear(x, weight, bias), *rest)
