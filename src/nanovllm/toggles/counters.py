"""What each toggle did in a run. Loaded when it is asked for."""

from typing import Any

from nanovllm.config import LEVELS, Optimizations
from nanovllm.engine.stats import StepStats


def toggle_counters(optimizations: Optimizations, stats: StepStats) -> dict[str, dict[str, Any]]:
    """Level, `engaged` and `opportunity` of each optimization.

    engaged counts what only happens when the level is above its baseline: 0 when off, > 0 when on,
    or the launch is invalid. opportunity counts what it could do for this workload: may be 0; None
    where being engaged says it all.
    """
    policy = stats.policy_steps["continuous"] + stats.policy_steps["chunked"]
    fused = {
        name: sum(calls[key] for key in LEVELS[name][1:])
        for name, calls in (
            ("attention_backend", stats.attention_calls),
            ("kernels", stats.kernel_calls),
        )
    }
    counters: dict[str, tuple[int, int | None]] = {
        "attention_backend": (fused["attention_backend"], None),
        "kernels": (fused["kernels"], None),
        "prefix_cache": (
            stats.admissions if stats.prefix_lookup_tokens else 0,
            stats.prefix_hit_tokens,
        ),
        "cascade_attention": (stats.attention_calls["cascade"], stats.attention_calls["shared"]),
        "batching": (
            policy,
            stats.mixed_steps if optimizations.batching == "chunked" else stats.refills,
        ),
        "cuda_graphs": (stats.graph_replays, None),
        "overlap": (stats.overlapped_steps, None),
        "tensor_parallel_size": (sum(stats.all_reduces.values()), None),
        "all_reduce": (stats.all_reduces["symmetric_memory"], None),
        "data_parallel_size": (0, None),  # of one replica; data_parallel.py counts over all
    }
    return {
        name: {
            "level": getattr(optimizations, name),
            "baseline": LEVELS[name][0],
            "engaged": counters[name][0],
            "opportunity": counters[name][1],
        }
        for name in LEVELS
    }
