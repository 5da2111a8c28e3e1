"""The reference: plain PyTorch, any device.

activation        SwiGLU
attention         TorchAttention, the baseline backend
decode_step       gathers inputs and advances state in a captured decode step   (loaded with CUDA graphs)
experts           a mixture of experts                                          (loaded with such a model)
filtering         top-k and top-p                                               (loaded when asked for)
kv_store          K and V into the paged cache
logprobs          log-probabilities of sampled tokens                           (loaded when asked for)
norm, rope        RMSNorm; rotary embedding with its norms and the KV store
sampling          exact counter-based sampling
sampling_shards   the same over the shards of tensor-parallel ranks             (loaded in ranks)

rope imports norm and kv_store, experts activation; the others import nothing of this room.
"""

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
