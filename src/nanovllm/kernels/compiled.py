"""kernels=compile: torch.compile applied to each operation, here and nowhere else.

Batch sizes are symbolic: one compilation serves every step. The sampler stays as it is: its random numbers are defined
operation by operation in IEEE arithmetic, and a compiler that contracts a multiplication and an addition changes their bits.
"""

import torch as _torch

from nanovllm.kernels import torch as _oracle

_compile = _torch.compile(dynamic=True, fullgraph=True)

linear = _oracle.linear
rms_norm = _compile(_oracle.rms_norm)
add_rms_norm = _compile(_oracle.add_rms_norm)
qk_norm_rope_store_kv = _compile(_oracle.qk_norm_rope_store_kv)
silu_and_mul = _compile(_oracle.silu_and_mul)
sample = _oracle.sample
