"""Triton twins of kernels/torch/, with the same signatures. Loaded only when chosen.

activation        SwiGLU
attention/        TritonAttention
decode_step       gathers inputs and advances state in a captured decode step
experts           a mixture of experts as grouped matmuls   (loaded with such a model)
fused             matmuls fused with SwiGLU, or with norms, rotary embedding and KV store
kv_store          K and V into the paged cache
launch            programmatic dependent launch, shared memory, warps
linear            matmuls of a few rows
quantized_linear  matmuls of up to 64 rows with weights of 8 and 4 bits   (loaded when asked for)
norm, rope        RMSNorm; rotary embedding with its norms and the KV store
sampling          exact counter-based sampling
sampling_shards   the same over the shards of tensor-parallel ranks

All import launch; fused imports linear and rope.
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
