"""Replaces the weights of a loaded model, and the products that read them.

As in vLLM, the projections of attention, MLPs and experts are quantized; embeddings, the output head, norms, biases and a
router's weights are not. Each weight replaces its original before the next one is made, so memory only shrinks.
"""

from collections import Counter
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from nanovllm.config import Optimizations
from nanovllm.kernels.registry import Kernels, Operation, counted
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear, TensorParallel
from nanovllm.quantization.weights import WEIGHTS, QuantizedWeight, check_fp8


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """kernels.linear, of a quantized weight: [tokens, inputs] -> [tokens, outputs]."""
    return weight.product(x, bias)


def quantize_weights(
    model: nn.Module,
    kernels: Kernels,
    optimizations: Optimizations,
    tp: TensorParallel,
    calls: Counter[str],
) -> None:
    """Quantizes every projection of a model whose weights are loaded, as optimizations.quantization says. kernels: those that the
    model was made with. Each product adds one to calls[level].

    Raises ValueError on a GPU that cannot compute the level, and for weights that the kernels cannot read.
    """
    level = optimizations.quantization
    if level == "fp8":
        check_fp8("quantization", "fp8", next(model.parameters()).device)
    make = WEIGHTS[level]
    operations = import_module(f"nanovllm.kernels.{optimizations.kernels}")
    multiply = product
    if optimizations.kernels == "triton":
        multiply = import_module("nanovllm.quantization.triton").product
    follows = {
        kernels.linear_silu_and_mul: operations.silu_and_mul,
        kernels.linear_qk_norm_rope_store_kv: operations.qk_norm_rope_store_kv,
    }
    layers: list[Any] = [module for module in model.modules() if _is_quantized(module)]
    for layer in layers:
        if isinstance(layer, ColumnParallelLinear):
            _replace(layer, "weight", make(layer.weight, None))
            layer.matmul = counted(followed_by(multiply, follows[layer.matmul]), level, calls)
        elif isinstance(layer, RowParallelLinear):
            _replace(layer, "weight", make(layer.weight, tp))
            if optimizations.kernels == "triton":
                import_module("nanovllm.quantization.triton").check(layer.weight)
            layer.linear = counted(multiply, level, calls)
        else:
            del layer.experts  # the names of a checkpoint for parts of the two tensors
            _replace(layer, "gate_up", make(layer.gate_up, None))
            _replace(layer, "down", make(layer.down, tp))
            experts = import_module("nanovllm.quantization.experts")
            layer.mix_experts = counted(experts.mix_experts, level, calls)


def _is_quantized(module: nn.Module) -> bool:
    """Whether it is a projection, or the experts of a layer."""
    return isinstance(module, ColumnParallelLinear | RowParallelLinear) or hasattr(
        module, "mix_experts"
    )


def followed_by(multiply: Operation, operation: Operation) -> Operation:
    """A product of a quantized weight, and the operation on its result: silu_and_mul, or what leads to attention."""

    def matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *rest: Any) -> Any:
        return operation(multiply(x, weight, bias), *rest)

    return matmul


def _replace(layer: Any, name: str, weight: QuantizedWeight) -> None:
    """A tensor gives way to what is no tensor."""
    delattr(layer, name)
    setattr(layer, name, weight)
