"""gpu-kernels: each Triton kernel against its torch twin and, for attention, FlashAttention; GB/s
beside the card's copy bandwidth.

    PYTHONPATH=src:. python -m pytest benchmarks/bench_kernels.py -m bench --benchmark-json kernels.json   # with pytest-benchmark
    PYTHONPATH=src:. python benchmarks/bench_kernels.py --out kernels.json                                 # without it

Both write pytest-benchmark's fields; `extra_info` adds what it moves and how fast. The second
measures with the device's own clock, takes the implementations of a case in turn, round by round,
and so can give an interval for their ratio: this is what claims are judged by. Shapes are those of
Qwen3-0.6B in bfloat16. Small kernels are timed in a CUDA graph of 28, one a layer, as the engine
runs them. A ratio is of one process on one card: repeat the command for what varies between
processes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_kernels as shapes
from nanovllm.kernels import triton as ours
from nanovllm.kernels.torch import activation, kv_store, linear, norm, rope, sampling
from nanovllm.kernels.torch.attention import TorchAttention
from nanovllm.kernels.triton.attention.backend import TritonAttention

ROUNDS, T_95 = 30, 2.045  # Student's t for 29 degrees of freedom
REQUESTS = {
    "canonical": shapes.uniform(256, 100, 1700),
    "64": shapes.uniform(64, 130, 380),
    "8": shapes.uniform(8, 130, 380),
    "1": [256],
}
HEAD = (shapes.KV_HEADS, shapes.HEAD_DIM)


@dataclass
class Case:
    """One operation at one shape. implementations: name -> function of the layer's number.
    num_bytes: moved by a call.
    """

    group: str
    shape: str
    implementations: dict[str, Callable[[int], object]]
    num_bytes: int
    flop: float = 0.0
    calls: int = shapes.LAYERS  # in a graph; 0: no graph
    captured: dict[str, Callable[[], object]] = field(default_factory=dict)

    def capture(self) -> dict[str, Callable[[], object]]:
        """What a round runs, of each implementation: a graph of `calls` calls, or a call."""
        for name, function in self.implementations.items():
            function(0)
            torch.cuda.synchronize()
            if not self.calls:
                self.captured[name] = partial(function, 0)
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                for i in range(self.calls):
                    function(i)
            self.captured[name] = graph.replay
        return self.captured

    def extra_info(self, name: str, call_s: float, copy_bytes_per_s: float) -> dict[str, Any]:
        rate = self.num_bytes / call_s
        return {
            "implementation": name,
            "shape": self.shape,
            "calls_a_round": max(1, self.calls),
            "call_us": call_s * 1e6,
            "bytes": self.num_bytes,
            "gb_per_s": rate / 1e9,
            "share_of_copy_bandwidth": rate / copy_bytes_per_s,
            "tflop_per_s": self.flop / call_s / 1e12,
        }


def attention_backends(page: int) -> Iterator[tuple[str, Any]]:
    geometry = (shapes.KV_HEADS, page, shapes.HEAD_DIM, shapes.DTYPE)
    yield "triton", TritonAttention(*geometry)
    yield "torch", TorchAttention(*geometry)
    try:
        from nanovllm.kernels.flash_attn import FlashAttention

        library = FlashAttention(*geometry)
    except ImportError as error:
        print(f"without FlashAttention: {error}")
    else:
        yield (
            "{provider} {version} (FlashAttention {generation})".format(
                **library.library.describe()
            ),
            library,
        )


def decode_case(shape: str) -> Case:
    contexts = REQUESTS[shape]
    batch, caches = shapes.decode_batch(contexts, 256)
    q, functions = shapes.draw(len(contexts), shapes.HEADS, shapes.HEAD_DIM), {}
    for name, backend in attention_backends(256):
        backend.prepare(batch)
        functions[name] = partial(_attend, backend, batch, batch.attention, q, caches)
    return Case(
        "decode attention",
        f"{len(contexts)} requests, {sum(contexts)} tokens",
        functions,
        sum(contexts) * math.prod(HEAD) * 2 * 2,
        calls=8,
    )


def prefill_case(lengths: list[int]) -> Case:
    batch, caches = shapes.decode_batch(lengths, 256)
    batch.num_decodes, batch.host_query_lens = 0, lengths
    batch.query_start_loc = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    q, functions = shapes.draw(sum(lengths), shapes.HEADS, shapes.HEAD_DIM), {}
    k, v = (shapes.draw(sum(lengths), *HEAD) for _ in range(2))
    for name, backend in attention_backends(256):
        backend.prepare(batch)
        functions[name] = partial(_attend, backend, batch, batch.attention, q, caches, k=k, v=v)
    return Case(
        "prefill attention",
        f"{len(lengths)} x {lengths[0]} tokens",
        functions,
        2 * q.nbytes + 2 * k.nbytes,
        sum(2 * n * (n + 1) * shapes.HEADS * shapes.HEAD_DIM for n in lengths),
        calls=0,
    )


def _attend(
    backend: Any,
    batch: Any,
    prepared: Any,
    q: Any,
    caches: Any,
    layer: int,
    k: Any = None,
    v: Any = None,
) -> object:
    batch.attention = prepared
    return backend.attend(
        q, q if k is None else k, q if v is None else v, *caches[layer % 2], batch
    )


def step_cases(tokens: int) -> Iterator[Case]:
    """What a decode step of `tokens` requests runs beside attention."""
    draw, where = shapes.draw, f"{tokens} tokens"
    x, residual, weight = (
        draw(tokens, shapes.HIDDEN),
        draw(tokens, shapes.HIDDEN),
        draw(shapes.HIDDEN),
    )
    qkv, head_weight = (
        draw(tokens, (shapes.HEADS + 2 * shapes.KV_HEADS) * shapes.HEAD_DIM),
        draw(shapes.HEAD_DIM),
    )
    cos_sin, gate_up = (
        draw(tokens, shapes.HEAD_DIM, dtype=torch.float32),
        draw(tokens, 2 * shapes.INTERMEDIATE),
    )
    caches = [draw(300, shapes.KV_HEADS, 256, shapes.HEAD_DIM) for _ in range(2)]
    slots, kv = torch.randperm(300 * 256, device="cuda")[:tokens], draw(tokens, *HEAD)
    logits, ones = draw(tokens, shapes.VOCAB) * 2, torch.full((tokens,), 0.6, device="cuda")
    ints, flags = (
        torch.arange(tokens, device="cuda"),
        {"all_greedy": False, "any_top_k_top_p": False},
    )

    def pair(
        function: str, twin: Any, *arguments: Any, **options: Any
    ) -> dict[str, Callable[[int], object]]:
        both = {"triton": getattr(ours, function), "torch": getattr(twin, function)}
        return {name: lambda _, f=f: f(*arguments, **options) for name, f in both.items()}

    yield Case("store KV", where, pair("store_kv", kv_store, kv, kv, *caches, slots), 4 * kv.nbytes)
    yield Case(
        "qk norm, rope, store KV",
        where,
        pair(
            "qk_norm_rope_store_kv",
            rope,
            qkv,
            head_weight,
            head_weight,
            1e-6,
            cos_sin,
            *caches,
            slots,
        ),
        qkv.nbytes * 9 // 4 + cos_sin.nbytes,
    )
    yield Case(
        "add, RMSNorm", where, pair("add_rms_norm", norm, x, residual, weight, 1e-6), 4 * x.nbytes
    )
    yield Case("SiLU", where, pair("silu_and_mul", activation, gate_up), gate_up.nbytes * 3 // 2)
    yield Case(
        "sampling",
        where,
        pair("sample", sampling, logits, ones, ints, ones, ints, ints, **flags),
        logits.nbytes,
        calls=2,
    )
    if tokens <= 16:
        weights = [draw(2 * shapes.INTERMEDIATE, shapes.HIDDEN) for _ in range(shapes.LAYERS)]
        both = {"triton": ours.linear, "cuBLAS": linear}
        products = {name: lambda i, f=f: f(x, weights[i]) for name, f in both.items()}
        yield Case(
            "linear, gate and up",
            where,
            products,
            weights[0].nbytes,
            2.0 * tokens * weights[0].numel(),
        )


CASES: dict[str, Callable[[], list[Case]]] = {
    **{f"decode-{shape}": lambda shape=shape: [decode_case(shape)] for shape in REQUESTS},
    **{
        f"prefill-{n}": lambda n=n, count=count: [prefill_case([n] * count)]
        for n, count in ((560, 29), (4096, 4))
    },
    **{
        f"step-{tokens}": lambda tokens=tokens: list(step_cases(tokens))
        for tokens in (1, 8, 64, 256)
    },
}


def device_s(function: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(
    case: Case, clock: Callable[[Callable[[], object]], float], rng: random.Random
) -> dict[str, list[float]]:
    """Seconds of a call in each round, by implementation; in random order within a round."""
    captured = case.capture()
    times: dict[str, list[float]] = defaultdict(list)
    for i in range(ROUNDS + 3):
        for name in rng.sample(sorted(captured), len(captured)):
            seconds = clock(captured[name]) / max(1, case.calls)
            if i >= 3:  # the first ones warm up
                times[name].append(seconds)
    return times


def entries(
    case: Case, times: dict[str, list[float]], copy_bytes_per_s: float
) -> list[dict[str, Any]]:
    """pytest-benchmark's entries; beside "triton" how many times faster it is than each other, with
    a 95 % interval over rounds.
    """
    rows = []
    for name, rounds in times.items():
        stats = {
            "min": min(rounds),
            "max": max(rounds),
            "mean": statistics.fmean(rounds),
            "stddev": statistics.stdev(rounds),
            "median": statistics.median(rounds),
            "rounds": len(rounds),
            "data": rounds,
        }
        info = case.extra_info(name, stats["median"], copy_bytes_per_s)
        if name != "triton":
            logs = [
                math.log(other / mine) for mine, other in zip(times["triton"], rounds, strict=True)
            ]
            mean, half = (
                statistics.fmean(logs),
                T_95 * statistics.stdev(logs) / math.sqrt(len(logs)),
            )
            info["times_slower_than_triton"] = [
                math.exp(mean),
                math.exp(mean - half),
                math.exp(mean + half),
            ]
        rows.append(
            {
                "group": f"{case.group}: {case.shape}",
                "name": f"{case.group}[{case.shape}-{name}]",
                "stats": stats,
                "extra_info": info,
            }
        )
    return rows


@pytest.mark.bench
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_kernels(name: str, request: pytest.FixtureRequest) -> None:
    """Every implementation of these cases; the table of pytest-benchmark has the first only, its
    JSON's extra_info all.
    """
    benchmark, copy = request.getfixturevalue("benchmark"), shapes.copy_bandwidth()
    rows = [
        row
        for case in CASES[name]()
        for row in entries(case, measure(case, device_s, random.Random(name)), copy)
    ]
    benchmark.extra_info |= {
        "copy_gb_per_s": copy / 1e9,
        "rows": [{**row["extra_info"], "group": row["group"]} for row in rows],
    }
    case = CASES[name]()[0]
    function = case.capture()["triton"]
    benchmark.pedantic(
        lambda: (function(), torch.cuda.synchronize()), rounds=ROUNDS, warmup_rounds=3
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        copy = shapes.copy_bandwidth()
        for name in args.cases:
            for case in CASES[name]():
                rows += entries(case, measure(case, device_s, random.Random(args.seed)), copy)
                for row in rows[-len(case.captured) :]:
                    info = row["extra_info"]
                    ratio = info.get("times_slower_than_triton")
                    beside = (
                        ""
                        if ratio is None
                        else "  {:.2f} times triton's ({:.2f} to {:.2f})".format(*ratio)
                    )
                    print(
                        f"{row['name']:72} {info['call_us']:9.1f} us {info['gb_per_s']:7.0f} GB/s{beside}",
                        flush=True,
                    )
            torch.cuda.empty_cache()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": copy / 1e9,
    }
    args.out.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
