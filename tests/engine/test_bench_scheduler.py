"""pytest-benchmark: planning costs O(scheduled requests), allocation O(blocks named). `make bench`
prints the figures.

The two tests named `*_scales` assert it on paired medians and run with `make test`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.config import Optimizations, ResolvedConfig
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import SamplingParams


def running_scheduler(num_running: int) -> Scheduler:
    """`num_running` requests, all decoding."""
    config = ResolvedConfig(
        model="none",
        dtype="auto",
        device="cpu",
        seed=0,
        max_model_len=1 << 20,
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * 16,
        block_size=16,
        optimizations=Optimizations(batching="chunked", prefix_cache=True),
    )
    stats = StepStats()
    blocks = CachingBlockManager(num_running * 80, 16, stats)
    scheduler = ContinuousScheduler(config, blocks, stats)
    for i in range(num_running):
        scheduler.add(Sequence(str(i), [i, 1, 2, 3], SamplingParams(max_tokens=1000)))
    step(scheduler)
    assert len(scheduler.decoding) == num_running
    return scheduler


def step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, [7] * len(plan.rows))


def churn(manager: CachingBlockManager) -> None:
    """64 requests of 16 blocks come and go."""
    tables = [manager.allocate(16) for _ in range(64)]
    for table in tables:
        manager.release(table)


def ratio_of_medians(large: Callable[[], Any], small: Callable[[], Any], rounds: int = 60) -> float:
    """Both in turn, so that a machine that changes its speed changes both; medians, so that one
    interruption does not count.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, measured in zip((large, small), times, strict=True):
            begin = time.perf_counter()
            function()
            measured.append(time.perf_counter() - begin)
    return statistics.median(times[0]) / statistics.median(times[1])


@pytest.mark.parametrize("num_running", [256, 1024, 4096])
@pytest.mark.bench
def test_scheduler_step(benchmark: Any, num_running: int) -> None:
    benchmark.extra_info["requests"] = num_running
    # they end after 1,000
    benchmark.pedantic(step, args=(running_scheduler(num_running),), rounds=300, warmup_rounds=20)


@pytest.mark.parametrize("num_blocks", [1_000, 10_000, 100_000])
@pytest.mark.bench
def test_allocate_and_release_1024_blocks(benchmark: Any, num_blocks: int) -> None:
    benchmark(churn, CachingBlockManager(num_blocks + 1024, 16, StepStats()))


def test_scheduler_step_scales() -> None:
    large, small = running_scheduler(4096), running_scheduler(256)
    ratio = ratio_of_medians(lambda: step(large), lambda: [step(small) for _ in range(16)])
    print(f"a step's time per request, 4,096 running against 256: {ratio:.2f}")
    assert ratio <= 1.5


def test_allocation_scales() -> None:
    large, small = (
        CachingBlockManager(100_000, 16, StepStats()),
        CachingBlockManager(1_024, 16, StepStats()),
    )
    ratio = ratio_of_medians(lambda: churn(large), lambda: churn(small))
    print(f"allocating and releasing, 100,000 blocks against 1,024: {ratio:.2f}")
    assert ratio <= 1.5
