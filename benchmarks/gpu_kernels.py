"""Each Triton kernel on a GPU: time, and achieved bandwidth beside the copy bandwidth of the same
card.

    PYTHONPATH=src python benchmarks/gpu_kernels.py --out kernels.json            # about a minute
    PYTHONPATH=src python benchmarks/gpu_kernels.py --out kernels.json --sweep    # and attention's tilings

Shapes are those of Qwen3-0.6B in bfloat16. Small kernels are timed inside a CUDA graph that runs 28
of them on different
weights, as the engine does: what counts there is the time from one kernel's start to the next
one's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import triton as ours
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.torch import activation, kv_store, norm, rope, sampling
from nanovllm.kernels.triton.attention.backend import Tiling, TritonAttention

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 28, 1024, 16, 8, 128, 3072, 151_936
DTYPE = torch.bfloat16


def median_s(function: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median seconds of a call, by device events."""
    for _ in range(warmup):
        function()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[len(times) // 2] / 1e3


def replayed_s(function: Callable[[int], object], times: int = LAYERS) -> float:
    """Seconds of one call of `function(i)`, from a graph that holds `times` of them."""
    function(0)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(times):
            function(i)
    seconds = median_s(graph.replay) / times
    del graph
    return seconds


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = draw(1 << 30)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source))


def decode_batch(
    contexts: list[int], page: int
) -> tuple[ForwardBatch, list[tuple[Tensor, Tensor]]]:
    """A decode batch and two layers of cache with pages in random order."""
    width = -(-max(contexts) // page)
    tables = torch.zeros(len(contexts), width, dtype=torch.int32)
    needed = [-(-c // page) for c in contexts]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).int()
    at = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[at : at + count]
        at += count
    caches = [
        (draw(sum(needed), KV_HEADS, page, HEAD_DIM), draw(sum(needed), KV_HEADS, page, HEAD_DIM))
        for _ in range(2)
    ]
    n, nothing = len(contexts), torch.empty(0, device="cuda")
    batch = ForwardBatch(
        nothing,
        nothing,
        nothing,
        tables.cuda(),
        torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        torch.arange(n + 1, device="cuda"),
        n,
        [1] * n,
        contexts,
    )
    return batch, caches


def attention_error(
    attention: TritonAttention, batch: ForwardBatch, cache: tuple[Tensor, Tensor], q: Tensor
) -> float:
    """Relative error of the first decodes against float64."""
    out = attention.attend(q, q, q, *cache, batch)
    worst = 0.0
    for i in range(min(8, batch.num_decodes)):
        length = batch.host_seq_lens[i]
        pages = batch.block_tables[i, : -(-length // cache[0].shape[2])].long()
        k, v = (
            c[pages].transpose(0, 1).reshape(KV_HEADS, -1, HEAD_DIM)[:, :length].double()
            for c in cache
        )
        scores = (
            torch.einsum("kgd,ktd->kgt", q[i].view(KV_HEADS, -1, HEAD_DIM).double(), k)
            * HEAD_DIM**-0.5
        )
        exact = torch.einsum("kgt,ktd->kgd", scores.softmax(-1), v).reshape(HEADS, HEAD_DIM)
        worst = max(worst, float((out[i].double() - exact).norm() / exact.norm()))
    return worst


def decode_attention(
    contexts: list[int], page: int, tiling: Tiling | None = None, per_sm: int | None = None
) -> dict[str, Any]:
    batch, caches = decode_batch(contexts, page)
    attention = TritonAttention(KV_HEADS, page, HEAD_DIM, DTYPE)
    sms = torch.cuda.get_device_properties().multi_processor_count
    attention.decode = tiling or attention.decode
    attention.num_programs = sms * per_sm if per_sm else attention.num_programs
    q = draw(len(contexts), HEADS, HEAD_DIM)
    attention.prepare(batch)
    error = attention_error(attention, batch, caches[0], q)
    seconds = replayed_s(lambda i: attention.attend(q, q, q, *caches[i % 2], batch), 8)
    num_bytes = sum(contexts) * KV_HEADS * HEAD_DIM * 2 * 2
    return {
        "requests": len(contexts),
        "tokens": sum(contexts),
        "page": page,
        "tiling": list(attention.decode),
        "programs_per_sm": attention.num_programs / sms,
        "us": seconds * 1e6,
        "gb_per_s": num_bytes / seconds / 1e9,
        "relative_error": error,
    }


def uniform(count: int, low: int, high: int) -> list[int]:
    return torch.randint(
        low, high + 1, (count,), generator=torch.Generator().manual_seed(1)
    ).tolist()


def attention_study(sweep: bool) -> list[dict[str, Any]]:
    canonical = uniform(256, 100, 1700)
    rows = [decode_attention(canonical, page) for page in (256, 64, 16)]
    for contexts in (
        [256],
        uniform(8, 130, 380),
        uniform(64, 130, 380),
        uniform(64, 900, 1900),
        [32_000],
        uniform(130, 100, 1700),
    ):
        rows.append(decode_attention(contexts, 256))
    if sweep:
        variants = [
            (64, 5, 4, 1),
            (64, 5, 4, 2),
            (64, 5, 4, 3),
            (64, 5, 4, 6),
            (64, 7, 4, 2),
            (64, 3, 4, 3),
            (64, 3, 4, 4),
            (128, 3, 4, 2),
            (128, 5, 4, 1),
            (128, 5, 8, 1),
            (32, 7, 4, 4),
            (32, 5, 2, 6),
            (64, 5, 2, 3),
        ]
        for tile, stages, warps, per_sm in variants:
            for contexts in (canonical, uniform(64, 130, 380)):
                rows.append(
                    decode_attention(contexts, 256, Tiling(tile, warps, stages, 16), per_sm)
                )
    return rows


def prefill_study() -> list[dict[str, Any]]:
    rows = []
    for lengths in ([560] * 29, [4096] * 4, [16_384]):
        page, tokens = 256, sum(lengths)
        batch, caches = decode_batch(lengths, page)
        starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        batch.num_decodes, batch.host_query_lens = 0, lengths
        batch.query_start_loc = torch.tensor(starts, device="cuda")
        attention = TritonAttention(KV_HEADS, page, HEAD_DIM, DTYPE)
        q = draw(tokens, HEADS, HEAD_DIM)
        attention.prepare(batch)
        seconds = median_s(partial(attention.attend, q, q, q, *caches[0], batch), 10)
        flop = sum(4 * n * (n + 1) / 2 * HEADS * HEAD_DIM for n in lengths)
        rows.append(
            {
                "lengths": f"{len(lengths)} x {lengths[0]}",
                "us": seconds * 1e6,
                "tflop_per_s": flop / seconds / 1e12,
            }
        )
    return rows


def operations(num_tokens: int) -> list[dict[str, Any]]:
    """What a decode step of `num_tokens` requests runs beside attention: Triton, its torch twin,
    and the GEMMs.
    """
    x, residual, weight = draw(num_tokens, HIDDEN), draw(num_tokens, HIDDEN), draw(HIDDEN)
    qkv, head_weight = draw(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM), draw(HEAD_DIM)
    cos_sin, gate_up = (
        draw(num_tokens, HEAD_DIM, dtype=torch.float32),
        draw(num_tokens, 2 * INTERMEDIATE),
    )
    caches = draw(300, KV_HEADS, 256, HEAD_DIM), draw(300, KV_HEADS, 256, HEAD_DIM)
    slots = torch.randperm(300 * 256, device="cuda")[:num_tokens]
    k = draw(num_tokens, KV_HEADS, HEAD_DIM)
    logits, ones = draw(num_tokens, VOCAB) * 2, torch.full((num_tokens,), 0.6, device="cuda")
    ints = torch.arange(num_tokens, device="cuda")
    pairs: list[tuple[str, Callable[[], object], Callable[[], object], int]] = [
        (
            "add_rms_norm",
            lambda: ours.add_rms_norm(x, residual, weight, 1e-6),
            lambda: norm.add_rms_norm(x, residual, weight, 1e-6),
            4 * x.nbytes,
        ),
        (
            "silu_and_mul",
            lambda: ours.silu_and_mul(gate_up),
            lambda: activation.silu_and_mul(gate_up),
            gate_up.nbytes * 3 // 2,
        ),
        (
            "qk_norm_rope_store_kv",
            lambda: ours.qk_norm_rope_store_kv(
                qkv, head_weight, head_weight, 1e-6, cos_sin, *caches, slots
            ),
            lambda: rope.qk_norm_rope_store_kv(
                qkv, head_weight, head_weight, 1e-6, cos_sin, *caches, slots
            ),
            qkv.nbytes * 9 // 4,
        ),
        (
            "store_kv",
            lambda: ours.store_kv(k, k, *caches, slots),
            lambda: kv_store.store_kv(k, k, *caches, slots),
            4 * k.nbytes,
        ),
        (
            "sample",
            lambda: ours.sample(
                logits, ones, ints, ones, ints, ints, all_greedy=False, any_top_k_top_p=False
            ),
            lambda: sampling.sample(
                logits, ones, ints, ones, ints, ints, all_greedy=False, any_top_k_top_p=False
            ),
            logits.nbytes,
        ),
    ]
    rows: list[dict[str, Any]] = []
    for name, mine, twin, num_bytes in pairs:
        repeats = 2 if name == "sample" else LAYERS
        triton_s, torch_s = (replayed_s(lambda _, f=f: f(), repeats) for f in (mine, twin))
        rows.append(
            {
                "operation": name,
                "tokens": num_tokens,
                "triton_us": triton_s * 1e6,
                "torch_us": torch_s * 1e6,
                "speedup": torch_s / triton_s,
                "gb_per_s": num_bytes / triton_s / 1e9,
            }
        )
    same = torch.equal(pairs[-1][1](), pairs[-1][2]())  # type: ignore[arg-type]
    rows[-1]["same_tokens"] = same
    for name, n, k_dim in (
        ("qkv", 4096, HIDDEN),
        ("o", HIDDEN, 2048),
        ("gate_up", 2 * INTERMEDIATE, HIDDEN),
        ("down", HIDDEN, INTERMEDIATE),
        ("lm_head", VOCAB, HIDDEN),
    ):
        count = 1 if name == "lm_head" else LAYERS
        weights, inputs = [draw(n, k_dim) for _ in range(count)], draw(num_tokens, k_dim)
        times = [
            replayed_s(lambda i, w=weights, a=inputs, f=function: f(a, w[i]), count)
            for function in (F.linear, ours.linear)
        ]
        # What the engine runs: the output head is cuBLAS's always.
        seconds = times[0] if name == "lm_head" else times[1]
        rows.append(
            {
                "operation": f"gemm {name}",
                "tokens": num_tokens,
                "cublas_us": times[0] * 1e6,
                "engine_us": seconds * 1e6,
                "gb_per_s": weights[0].nbytes / seconds / 1e9,
                "tflop_per_s": 2 * num_tokens * n * k_dim / seconds / 1e12,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64, 256])
    args = parser.parse_args()
    with torch.inference_mode():
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_gb_per_s": copy_bandwidth() / 1e9,
        }
        result["decode_attention"] = attention_study(args.sweep)
        result["prefill_attention"] = prefill_study()
        result["operations"] = [row for tokens in args.tokens for row in operations(tokens)]
    args.out.write_text(json.dumps(result, indent=1))
    print(f"copy {result['copy_gb_per_s']:.0f} GB/s")
    for rows in (result["decode_attention"], result["prefill_attention"], result["operations"]):
        for row in rows:
            print(
                "  ".join(
                    f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                    for key, value in row.items()
                )
            )


if __name__ == "__main__":
    main()
