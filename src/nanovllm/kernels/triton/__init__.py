"""Triton twins of kernels/torch/, loaded only when chosen: one file an operation, the same
signatures.
"""

from nanovllm.kernels.triton.activation import silu_and_mul
from nanovllm.kernels.triton.decode_step import advance_rows, gather_decode_inputs, write_blocks
from nanovllm.kernels.triton.fused import linear_qk_norm_rope_store_kv, linear_silu_and_mul
from nanovllm.kernels.triton.kv_store import store_kv
from nanovllm.kernels.triton.linear import linear
from nanovllm.kernels.triton.norm import add_rms_norm, rms_norm
from nanovllm.kernels.triton.rope import qk_norm_rope_store_kv
from nanovllm.kernels.triton.sampling import sample

__all__ = [
    "add_rms_norm",
    "advance_rows",
    "gather_decode_inputs",
    "linear",
    "linear_qk_norm_rope_store_kv",
    "linear_silu_and_mul",
    "qk_norm_rope_store_kv",
    "rms_norm",
    "sample",
    "silu_and_mul",
    "store_kv",
    "write_blocks",
]
