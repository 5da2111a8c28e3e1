"""Captures work as a CUDA graph, and replays it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.stats import StepStats
from nanovllm.toggles.counters import reset


@dataclass(slots=True)
class Captured:
    """A graph, where its result lies, and what one replay executes."""

    graph: Any  # torch.cuda.CUDAGraph
    output: Tensor  # overwritten by each replay
    kernel_calls: Counter[str]
    attention_calls: Counter[str]
    all_reduces: Counter[str] = field(default_factory=Counter)

    def replay(self, stats: StepStats) -> Tensor:
        self.graph.replay()
        stats.graph_replays += 1
        stats.kernel_calls.update(self.kernel_calls)
        stats.attention_calls.update(self.attention_calls)
        stats.all_reduces.update(self.all_reduces)
        return self.output


@torch.inference_mode()
def capture(
    forward: Callable[[], Tensor], stats: StepStats, pool: Any, stream: torch.cuda.Stream
) -> Captured:
    """Runs `forward` twice: once to compile kernels and choose GEMM algorithms, once to capture it.

    pool: of the memory that graphs share (`torch.cuda.graph_pool_handle`). Counters in `stats` are reset: what
    the captured run counts is what each replay will count. Raises what `forward` raises; the capture is ended.
    """
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        forward()
        stream.synchronize()
        reset(stats)
        # Other threads (NCCL's watchdog) may go on asking the device how far it is.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            output = forward()
        except BaseException:
            with suppress(RuntimeError):  # it reports that the capture is invalid
                # without this, nothing in this process could be captured or freed any more
                graph.capture_end()
            raise
        graph.capture_end()
    return Captured(
        graph, output, *map(Counter, (stats.kernel_calls, stats.attention_calls, stats.all_reduces))
    )
