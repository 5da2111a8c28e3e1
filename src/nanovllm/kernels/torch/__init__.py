"""The oracle: plain PyTorch, any device."""

from torch.nn.functional import linear

from nanovllm.kernels.torch.activation import linear_silu_and_mul, silu_and_mul
from nanovllm.kernels.torch.norm import add_rms_norm, rms_norm
from nanovllm.kernels.torch.rope import linear_qk_norm_rope_store_kv, qk_norm_rope_store_kv
from nanovllm.kernels.torch.sampling import sample

__all__ = [
    "add_rms_norm",
    "linear",
    "linear_qk_norm_rope_store_kv",
    "linear_silu_and_mul",
    "qk_norm_rope_store_kv",
    "rms_norm",
    "sample",
    "silu_and_mul",
]
