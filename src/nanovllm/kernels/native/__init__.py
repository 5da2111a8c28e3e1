"""kernels=native and attention_backend=native: C++ twins of kernels/torch/ for CPUs. Loaded only when chosen.

attention    NativeAttention reads the paged cache in place   (loaded by the attention layer)
library      compiles the sources once for a machine, and their signatures
operations   the operations of a model
packing      PackedWeight: weights in the order in which products read them

vec.h        vectors, bfloat16, threads; norm.h: RMSNorm of a row
*.cpp        norm, linear (products and what follows them), attention, sampling

All import library; operations imports packing. The files are compiled by nanovllm.cxx.
"""

from nanovllm.kernels.native.operations import (
    add_rms_norm,
    linear,
    linear_qk_norm_rope_store_kv,
    linear_silu_and_mul,
    qk_norm_rope_store_kv,
    rms_norm,
    sample,
    silu_and_mul,
)

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
