"""kernels-cpu: what each operation of the model costs on this CPU, by implementation and number of rows.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/cpu_kernels.py                      # tiny, float32
    OMP_NUM_THREADS=2 PYTHONPATH=src python benchmarks/cpu_kernels.py --model qwen3-0.6b    # bfloat16

Implementations take turns within a round, and each line has the median over rounds: microseconds, and the paired ratio
of the first implementation to each. Products are also computed by the library with packed weights, where it can:

    mkldnn    oneDNN with a weight that it has reordered (torch.ops.mkldnn)
    mkl       MKL with a weight packed for this number of rows; it keeps the original as well (torch.ops.mkl)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import native
from nanovllm.kernels import torch as twins
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.native.attention import NativeAttention
from nanovllm.kernels.native.packing import pack
from nanovllm.kernels.torch.attention import TorchAttention
from nanovllm.models.checkpoint import PRESETS

Ways = dict[str, Callable[[], Any]]


def timed(function: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls * 1e6


def compare(ways: Ways, rounds: int, round_s: float) -> dict[str, dict[str, float]]:
    """Microseconds a call, and the median of the first way's time over each way's in the same round."""
    calls = {}
    for name, function in ways.items():
        function()
        calls[name] = max(1, int(round_s / (timed(function, 1) * 1e-6 + 1e-9)))
    times = [{name: timed(f, calls[name]) for name, f in ways.items()} for _ in range(rounds)]
    first = next(iter(ways))
    return {
        name: {
            "us": statistics.median(t[name] for t in times),
            "ratio": statistics.median(t[first] / t[name] for t in times),
        }
        for name in ways
    }


def products(x: Tensor, weight: Tensor) -> Ways:
    """A matrix product by every implementation that there is here."""
    packed = pack(weight)
    ways: Ways = {
        "torch": lambda: twins.linear(x, weight),
        "native": lambda: native.linear(x, packed),
    }
    try:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        mkldnn = torch.ops.mkldnn._linear_pointwise
        mkldnn(x, reordered, None, "none", [], "")
        ways["mkldnn"] = lambda: mkldnn(x, reordered, None, "none", [], "")
    except (RuntimeError, AttributeError) as error:
        print(f"# no mkldnn for {weight.dtype}: {str(error).splitlines()[0]}")
    if weight.dtype == torch.float32 and torch.backends.mkl.is_available():
        in_mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x))
        ways["mkl"] = lambda: torch.ops.mkl._mkl_linear(x, in_mkl, weight, None, len(x))
    return ways


def cases(shape: Any, dtype: torch.dtype, rows: int, context: int) -> dict[str, Ways]:
    """The operations of one layer and the sampler, at a decode step of `rows` requests."""
    hidden, heads, kv_heads, d = (
        shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim,
    )  # fmt: skip

    def draw(*size: int) -> Tensor:
        return torch.randn(*size).to(dtype)

    x, residual, norm, head_norm = draw(rows, hidden), draw(rows, hidden), draw(hidden), draw(d)
    qkv, gate_up = (
        draw((heads + 2 * kv_heads) * d, hidden) * 0.05,
        draw(2 * shape.intermediate_size, hidden) * 0.05,
    )
    down, head = draw(hidden, shape.intermediate_size), draw(shape.vocab_size, hidden)
    packed_qkv, packed_gate_up = pack(qkv, heads + 2 * kv_heads), pack(gate_up, 2)
    blocks = -(-context // 16)
    caches = torch.randn(2, rows * blocks, kv_heads, 16, d).to(dtype)
    tables = torch.randperm(rows * blocks).view(rows, blocks).int()
    lengths = torch.linspace(context // 4, context, rows).int()
    rest = (
        head_norm,
        head_norm,
        1e-6,
        torch.randn(rows, d),
        *caches,
        tables[:, 0].long() * 16 + torch.arange(rows) % 16,
    )
    empty = torch.zeros(0, dtype=torch.int64)
    batch = ForwardBatch(
        empty, empty, empty, tables, lengths, torch.arange(rows + 1), rows, [1] * rows,
        lengths.tolist(),
    )  # fmt: skip
    q, kv = draw(rows, heads, d), draw(rows, kv_heads, d)

    def attention(backend: Any) -> Callable[[], Any]:
        made = backend(kv_heads, 16, d, dtype)
        made.prepare(batch)
        prepared = batch.attention

        def attend() -> Any:
            batch.attention = prepared
            return made.attend(q, kv, kv, *caches, batch)

        return attend

    logits = torch.randn(rows, shape.vocab_size).to(dtype) * 2.5
    zeros = torch.zeros(rows, dtype=torch.int64)
    drawing = (logits, torch.full((rows,), 0.6), zeros, torch.ones(rows), zeros + 7, zeros + 100)
    flags = {"all_greedy": False, "any_top_k_top_p": False}
    return {
        "down": products(draw(rows, shape.intermediate_size), down),
        "lm_head": products(x, head),
        "qkv+norm+rope+kv": {
            "torch": lambda: twins.linear_qk_norm_rope_store_kv(x, qkv, None, *rest),
            "native": lambda: native.linear_qk_norm_rope_store_kv(x, packed_qkv, None, *rest),
            "unpacked": lambda: native.linear_qk_norm_rope_store_kv(x, qkv, None, *rest),
        },
        "gate_up+silu": {
            "torch": lambda: twins.linear_silu_and_mul(x, gate_up),
            "native": lambda: native.linear_silu_and_mul(x, packed_gate_up),
            "unpacked": lambda: native.linear_silu_and_mul(x, gate_up),
        },
        "add+norm": {
            "torch": lambda: twins.add_rms_norm(x, residual, norm, 1e-6),
            "native": lambda: native.add_rms_norm(x, residual, norm, 1e-6),
        },
        f"attention of {context}": {
            "torch": attention(TorchAttention),
            "native": attention(NativeAttention),
        },
        "sampling": {
            "torch": lambda: twins.sample(*drawing, **flags),
            "native": lambda: native.sample(*drawing, **flags),
        },
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny", choices=list(PRESETS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the preset's")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 96])
    parser.add_argument("--context", type=int, default=128, help="tokens of the longest request")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-ms", type=float, default=20.0)
    parser.add_argument("--out", help="a file for the results, as JSON")
    arguments = parser.parse_args()
    shape = PRESETS[arguments.model]
    dtype = getattr(torch, arguments.dtype or shape.dtype)
    torch.manual_seed(0)
    found = []
    print(
        f"# {arguments.model}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for rows in arguments.rows:
        for name, ways in cases(shape, dtype, rows, arguments.context).items():
            result = compare(ways, arguments.rounds, arguments.round_ms * 1e-3)
            found.append({"rows": rows, "operation": name, "ways": result})
            words = "   ".join(
                f"{way} {r['us']:9.1f} us (x{r['ratio']:.2f})" for way, r in result.items()
            )
            print(f"{rows:4} rows  {name:18} {words}", flush=True)
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump({"model": arguments.model, "dtype": str(dtype), "found": found}, file)


if __name__ == "__main__":
    main()
