"""kernels=triton and attention_backend=triton: products of quantized weights, and attention over a small cache, on a GPU.

Up to 64 rows are computed by kernels/triton/quantized_linear.py, more by the twin (QuantizedWeight.product), which dequantizes the
weight first.
"""

from typing import Any

from torch import Tensor

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.triton import quantized_linear as kernels
from nanovllm.kernels.triton.attention.backend import TritonAttention
from nanovllm.quantization.weights import GROUP, Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [tokens, inputs] -> [tokens, outputs] in x's dtype."""
    if len(x) > kernels.MOST_ROWS:
        return weight.product(x, bias)
    if isinstance(weight, Int8Weight):
        return kernels.int8_linear(x, weight.packed, weight.scales, bias)  # type: ignore[arg-type]
    if isinstance(weight, Fp8Weight):
        rounded, scales = weight.rounded(x)
        return kernels.fp8_linear(
            rounded,
            scales,
            weight.packed,  # type: ignore[arg-type]
            weight.scales,  # type: ignore[arg-type]
            bias,
            x.dtype,
        )
    return kernels.int4_linear(x, weight.packed, weight.scales, weight.zeros, bias)  # type: ignore[arg-type]


def check(weight: QuantizedWeight) -> None:
    """Raises ValueError for a weight that these kernels do not read."""
    if isinstance(weight, Int4Weight) and weight.first_input % GROUP:
        raise ValueError(
            f"quantization='int4' with kernels='triton' needs groups of {GROUP} inputs that no two ranks share, and a weight has "
            f"{weight.inputs} inputs on each rank: take kernels='torch', or another tensor_parallel_size"
        )


class TritonAttentionOfStored(TritonAttention):
    """TritonAttention whose caches are of type quantization.kv_cache.Stored."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Any, values: Any, batch: ForwardBatch
    ) -> Tensor:
        """As TritonAttention.attend, which reads e4m3. The scales of a head's keys and values are factors of its queries and
        results.
        """
        group = q.shape[1] // self.num_kv_heads
        out = super().attend(
            (q * keys.scales.repeat_interleave(group, dim=0)).to(q.dtype),
            k,
            v,
            keys.cache,
            values.cache,
            batch,
        )
        return (out * values.scales.repeat_interleave(group, dim=0)).to(out.dtype)
