"""The operations of a model, with the signatures of kernels/torch/.

A weight is a tensor, whose product is the library's, or a PackedWeight, whose product is fused with what follows it.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.native.library import dtype_code, library
from nanovllm.kernels.native.packing import PackedWeight

Weight: TypeAlias = Tensor | PackedWeight

# An operation whose packed weight has more than one group -> how many, of (outputs, head_dim).
GROUPS: dict[str, Callable[[int, int], int]] = {
    "linear_silu_and_mul": lambda outputs, head_dim: 2,
    "linear_qk_norm_rope_store_kv": lambda outputs, head_dim: outputs // head_dim,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., n], weight: [n] -> [..., n] in x's dtype, a new tensor."""
    x = x.contiguous()
    out = torch.empty_like(x)
    n = x.shape[-1]
    library().add_rms_norm(
        dtype_code(x.dtype), x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None, x.numel() // n, n, eps
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual), both new: neither input is written to."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    n = x.shape[-1]
    library().add_rms_norm(
        dtype_code(x.dtype), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(),
        x.numel() // n, n, eps,
    )  # fmt: skip
    return out, total


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x: [tokens, k], weight: [n, k] -> [tokens, n]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty(len(x), weight.outputs)
    library().linear(
        dtype_code(x.dtype), x.data_ptr(), weight.data.data_ptr(), _pointer(bias), out.data_ptr(),
        len(x), weight.k, weight.outputs,
    )  # fmt: skip
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [tokens, 2 * n], gate first -> silu(gate) * up: [tokens, n]."""
    gate_up = gate_up.contiguous()
    rows, n = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, n)
    library().silu_and_mul(dtype_code(out.dtype), gate_up.data_ptr(), out.data_ptr(), rows, n)
    return out


def linear_silu_and_mul(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x: [tokens, k], weight: [2 * n, k], gate first; packed in two groups -> silu(gate) * up: [tokens, n]."""
    if isinstance(weight, Tensor):
        return silu_and_mul(F.linear(x, weight, bias))
    x = x.contiguous()
    out = x.new_empty(len(x), weight.group_size)
    library().linear_silu_and_mul(
        dtype_code(x.dtype), x.data_ptr(), weight.data.data_ptr(), _pointer(bias), out.data_ptr(),
        len(x), weight.k, weight.group_size,
    )  # fmt: skip
    return out


def linear_qk_norm_rope_store_kv(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [tokens, k], weight: [(q_heads + 2 * kv_heads) * head_dim, k], packed with a group for each head: the QKV
    product, then qk_norm_rope_store_kv of kernels/torch/rope.py. Without q_weight and k_weight, heads are not normed.
    """
    rest = (q_weight, k_weight, eps, cos_sin, k_cache, v_cache, slot_mapping)
    if isinstance(weight, Tensor):
        return qk_norm_rope_store_kv(F.linear(x, weight, bias), *rest)
    return _qkv(x, weight.groups, weight.data.data_ptr(), bias, *rest)


def qk_norm_rope_store_kv(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As linear_qk_norm_rope_store_kv, of the product itself: [tokens, (q_heads + 2 * kv_heads) * head_dim]."""
    return _qkv(qkv, None, None, None, *rest)


def _qkv(
    x: Tensor,
    heads: int | None,
    packed: int | None,
    bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    _, kv_heads, block_size, head_dim = k_cache.shape
    x, cos_sin, slots = x.contiguous(), cos_sin.contiguous(), slot_mapping.contiguous()
    rows, q_heads = len(x), (heads or x.shape[1] // head_dim) - 2 * kv_heads
    q = x.new_empty(rows, q_heads, head_dim)
    k, v = x.new_empty(rows, kv_heads, head_dim), x.new_empty(rows, kv_heads, head_dim)
    library().qkv_norm_rope_store_kv(
        dtype_code(x.dtype), x.data_ptr(), packed, _pointer(bias), _pointer(q_weight), _pointer(k_weight), eps,
        cos_sin.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), rows, x.shape[1], q_heads, kv_heads, head_dim, block_size,
        k_cache.stride(0),
    )  # fmt: skip
    return q, k, v


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    all_greedy: bool,
    any_top_k_top_p: bool,
) -> Tensor:
    """As kernels/torch/sampling.py, bit for bit."""
    if filtered := any_top_k_top_p and not all_greedy:
        from nanovllm.kernels.torch.filtering import filtered_logits

        logits = filtered_logits(logits, temperatures, top_ks, top_ps)
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    temperatures, seeds, positions = (
        temperatures.contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
    )
    tokens = torch.empty(rows, dtype=torch.int64)
    library().sample(
        dtype_code(logits.dtype), logits.data_ptr(), vocab_size, temperatures.data_ptr(), seeds.data_ptr(),
        positions.data_ptr(), filtered, tokens.data_ptr(), rows, vocab_size,
    )  # fmt: skip
    return tokens


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
