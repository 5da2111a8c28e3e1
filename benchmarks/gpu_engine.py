"""The engine on a GPU, one configuration at a time: tokens a second, milliseconds a step, and where
they go.

    PYTHONPATH=src:. python benchmarks/gpu_engine.py --out all.json --workloads canonical latency-1 latency-8 latency-64
    PYTHONPATH=src:. python benchmarks/gpu_engine.py --out eager.json --set cuda_graphs=false --workloads latency-1 --profile

A tool for finding out what to do next. It checks no outputs and gives no intervals: what is
published comes from the studies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from experiments.workloads import build
from nanovllm import LLM, SamplingParams
from nanovllm.config import ALL
from nanovllm.models.checkpoint import ensure_checkpoint

WORKLOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "canonical": ("canonical", {}),
    **{
        f"latency-{n}": ("random", {"num_requests": n, "prompt_tokens": 128, "output_tokens": 256})
        for n in (1, 8, 64)
    },
    "decode-256": ("random", {"num_requests": 256, "prompt_tokens": 700, "output_tokens": 64}),
    "decode-130": ("random", {"num_requests": 130, "prompt_tokens": 880, "output_tokens": 64}),
    "prefix": (
        "shared_prefix",
        {
            "num_prefixes": 8,
            "prefix_tokens": 1024,
            "num_requests": 512,
            "own_tokens": 64,
            "output_tokens": 32,
        },
    ),
}


def serve(llm: LLM, workload: dict[str, Any]) -> dict[str, Any]:
    """One timed run, and what the engine counted in it."""
    requests = workload["waves"][0]
    prompts = [{"prompt_token_ids": r["prompt_token_ids"]} for r in requests]
    params = [
        SamplingParams(
            temperature=r["temperature"],
            max_tokens=r["max_tokens"],
            ignore_eos=r["ignore_eos"],
            seed=r["seed"],
        )
        for r in requests
    ]
    llm.reset_stats()
    llm.reset_prefix_cache()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    num_tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    steps = llm.step_times()
    decode = [s for s, prefill, _ in steps if not prefill]
    stats = llm.stats()
    return {
        "seconds": seconds,
        "output_tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "steps": len(steps),
        "prefill_steps": sum(p > 0 for _, p, _ in steps),
        "prefill_s": sum(s for s, p, _ in steps if p),
        "decode_ms_median": statistics.median(decode) * 1e3,
        "decode_ms_mean": statistics.fmean(decode) * 1e3,
        "step_ms_and_decodes": [(round(s * 1e3, 3), p, d) for s, p, d in steps],
        "stats": {
            k: stats[k]
            for k in (
                "graph_replays",
                "overlapped_steps",
                "preemptions",
                "mixed_steps",
                "prefix_hit_tokens",
            )
        },
    }


def kernel_times(llm: LLM, workload: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a step of each kernel, over the whole workload."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        result = serve(llm, workload)
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    spans = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += event.time_range.elapsed_us()
            kernels[event.name][1] += 1
            spans.append((event.time_range.start, event.time_range.end))
    spans.sort()
    steps = result["steps"]
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:24]
    return {
        "steps": steps,
        "busy_us_a_step": sum(v[0] for v in kernels.values()) / steps,
        "span_us_a_step": (max(s[1] for s in spans) - spans[0][0]) / steps,
        "kernels": [
            {"name": name[:90], "us_a_step": us / steps, "calls_a_step": calls / steps}
            for name, (us, calls) in top
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+", default=["canonical"], choices=list(WORKLOADS))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=JSON", help="switches of Optimizations"
    )
    parser.add_argument(
        "--engine",
        nargs="*",
        default=[],
        metavar="FIELD=JSON",
        help="other arguments of the engine",
    )
    parser.add_argument(
        "--model", default="qwen3-0.6b", help="a preset of nanovllm.models.checkpoint"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    workloads = {name: build(name, *WORKLOADS[name]) for name in args.workloads}
    switches = {name: getattr(ALL, name) for name in ALL.__dataclass_fields__} | _parsed(args.set)
    folder = ensure_checkpoint(args.model)
    free_before = torch.cuda.mem_get_info()[0]
    begin = time.perf_counter()
    engine = {"max_model_len": 4096, "block_size": 256} | _parsed(args.engine)
    llm = LLM(str(folder), optimizations=switches, skip_tokenizer_init=True, **engine)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "start_s": time.perf_counter() - begin,
        "config": llm.resolved_config(),
        "free_bytes": torch.cuda.mem_get_info()[0],
        "runs": {},
    }
    for name, workload in workloads.items():
        serve(llm, build("warm-up", "random", {"num_requests": 4, "output_tokens": 8}))
        result["runs"][name] = [serve(llm, workload) for _ in range(args.repeats)]
        if args.profile:
            result["runs"][name].append(kernel_times(llm, workload))
    result["toggles"] = llm.toggles()
    llm.close()
    del llm
    result["bytes_not_given_back"] = free_before - torch.cuda.mem_get_info()[0]
    # of those: PyTorch's; the rest is the driver's, for code
    result["bytes_still_reserved"] = torch.cuda.memory_reserved()
    args.out.write_text(json.dumps(result))
    report(result)


def report(result: dict[str, Any]) -> None:
    """For reading; the file has it all."""
    kept, reserved = result["bytes_not_given_back"] >> 20, result["bytes_still_reserved"] >> 20
    print(
        f"start {result['start_s']:.1f} s, KV {result['config']['kv_cache_bytes'] >> 20} MiB, free beside it "
        f"{result['free_bytes'] >> 20} MiB, kept after close {kept} MiB (PyTorch {reserved})",
        result["config"]["optimizations"],
    )
    for name, runs in result["runs"].items():
        for run in runs:
            if "kernels" in run:
                print(
                    f"  {name}: busy {run['busy_us_a_step']:.0f} us of {run['span_us_a_step']:.0f} us a step"
                )
                for kernel in run["kernels"]:
                    print(
                        f"    {kernel['us_a_step']:9.1f} us {kernel['calls_a_step']:7.1f} x  {kernel['name']}"
                    )
            else:
                print(
                    f"  {name}: {run['tokens_per_s']:.0f} tok/s, {run['seconds']:.3f} s, decode {run['decode_ms_median']:.3f} ms "
                    f"median, {run['decode_ms_mean']:.3f} mean, prefill {run['prefill_s']:.3f} s in {run['prefill_steps']} steps"
                )
                print(f"    {run['stats']}")


def _parsed(pairs: list[str]) -> dict[str, Any]:
    """['a=1', 'b=triton'] -> {'a': 1, 'b': 'triton'}."""
    values = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


if __name__ == "__main__":
    main()
