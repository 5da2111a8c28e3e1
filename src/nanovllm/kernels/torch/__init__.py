"""The oracle: plain PyTorch, any device."""

from torch.nn.functional import linear as linear

from nanovllm.kernels.torch.activation import silu_and_mul as silu_and_mul
from nanovllm.kernels.torch.norm import add_rms_norm as add_rms_norm
from nanovllm.kernels.torch.norm import rms_norm as rms_norm
from nanovllm.kernels.torch.rope import qk_norm_rope_store_kv as qk_norm_rope_store_kv
from nanovllm.kernels.torch.sampling import sample as sample
