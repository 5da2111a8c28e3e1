"""Admission on a full cache, without a model or a GPU: the engine's own scheduler, and a step time
fitted to an H200.

    PYTHONPATH=src:. python benchmarks/admission_model.py                      # the canonical workload, 5 GiB of KV
    PYTHONPATH=src:. python benchmarks/admission_model.py --forecast off       # as it was before

A step takes a(rows) + 27.1 ns a token of KV read + 2 us a prefill token, and 12.5 ms at least where
it holds a prefill, because that runs eagerly. The figures are those of 2026-11-22
(reports/published/h200/notes). With them and the old admission the model gives 27.6k tok/s for the
canonical workload in enough memory (measured 27.5k), and with 5 GiB 14.8k (measured 14.6k), in
3,650 steps with 177 preemptions (measured the same).
"""

from __future__ import annotations

import argparse
from collections import deque

import numpy as np

from experiments.workloads import build
from nanovllm.config import Optimizations, ResolvedConfig
from nanovllm.engine import admission
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import SamplingParams

TOKEN_BYTES = 114_688  # of KV: 28 layers, 8 heads of 128, bfloat16
ROWS, ROWS_MS = (1, 8, 64, 128, 256), (0.70, 0.82, 1.2, 1.3, 1.5)
KV_MS, PREFILL_MS, EAGER_MS = 27.1e-6, 2e-3, 12.5


def step_ms(plan: StepPlan) -> float:
    kv_tokens = sum(start + 1 for start in plan.starts[: plan.num_decodes])
    ms = (
        float(np.interp(len(plan.rows), ROWS, ROWS_MS))
        + kv_tokens * KV_MS
        + len(plan.token_ids) * PREFILL_MS
    )
    return max(EAGER_MS, ms) if plan.token_ids else ms


def simulate(kv_bytes: int, block_size: int, max_num_seqs: int, batching: str) -> dict[str, float]:
    """Serves the canonical workload with one step in flight, as overlap does."""
    config = ResolvedConfig(
        model="none",
        max_model_len=4096,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=16_384,
        block_size=block_size,
        optimizations=Optimizations(
            batching=batching, prefix_cache=True, cuda_graphs=True, overlap=True
        ),
    )
    stats = StepStats()
    blocks = CachingBlockManager(kv_bytes // (TOKEN_BYTES * block_size), block_size, stats)
    scheduler = ContinuousScheduler(config, blocks, stats)
    requests = build("canonical", "canonical", {})["waves"][0]
    for i, request in enumerate(requests):
        scheduler.add(
            Sequence(
                str(i),
                list(request["prompt_token_ids"]),
                SamplingParams(max_tokens=request["max_tokens"]),
            )
        )
    in_flight: deque[StepPlan] = deque()
    total_ms, eager_steps = 0.0, 0
    while scheduler.num_unfinished or in_flight:
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append(plan)
            total_ms += step_ms(plan)
            eager_steps += bool(plan.token_ids)
        if plan is None or len(in_flight) > 1:
            oldest = in_flight.popleft()
            scheduler.commit(oldest, [1] * sum(oldest.samples))
    tokens = sum(request["max_tokens"] for request in requests)
    return {
        "tokens_per_s": round(tokens / total_ms * 1e3),
        "steps": stats.steps,
        "steps_with_prefill": eager_steps,
        "preemptions": stats.preemptions,
        "recomputed_tokens": stats.recomputed_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kv-gib", type=float, default=5)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--batching", default="chunked", choices=["continuous", "chunked"])
    parser.add_argument("--forecast", default="on", choices=["on", "off"])
    args = parser.parse_args()
    if args.forecast == "off":
        admission.Forecast.fits = lambda *_: True  # type: ignore[method-assign]
    print(simulate(int(args.kv_gib * 2**30), args.block_size, args.max_num_seqs, args.batching))


if __name__ == "__main__":
    main()
