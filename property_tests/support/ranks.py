"""Tensor-parallel ranks in threads of this process: the real runners, shards and process groups
(gloo), without processes to start, so that a patch of any function reaches every rank. The one
module here that knows how the engine makes its ranks.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch

from nanovllm.config import EngineConfig, Optimizations, ResolvedConfig
from nanovllm.cpu.runner import CpuRunner
from nanovllm.distributed import collectives, workers
from nanovllm.engine.model_runner import ModelRunner, StepHandle
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import TokenLogprobs
from nanovllm.engine.stats import StepStats
from nanovllm.models.config import ModelConfig, load_hf_config

Group = collectives.DistributedTensorParallel


def in_ranks(
    size: int,
    rendezvous: str,
    work: Callable[[Group, StepStats], Any],
    timeout_s: float = 10.0,
    stats: StepStats | None = None,
) -> list[Any]:
    """`work(group, stats)` in `size` threads, each with its rank of one group; `stats` are rank
    0's.
    """

    def start(rank: int) -> Any:
        own = stats if stats is not None and rank == 0 else StepStats()
        on = Optimizations(tensor_parallel_size=size)
        return work(Group(rank, size, rendezvous, "cpu", on, own, [0] * 2 * size, timeout_s), own)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(start, range(size)))


class RanksInThreads:
    """Stands where TensorParallelRunner does."""

    def __init__(
        self, resolved: ResolvedConfig, model_config: ModelConfig, folder: Path, stats: StepStats
    ) -> None:
        size = resolved.optimizations.tensor_parallel_size

        on = resolved.optimizations
        exact = on.quantization == "none" and on.kv_cache_dtype == "auto"
        make = ModelRunner if exact else CpuRunner

        def start(group: Group, own: StepStats) -> ModelRunner:
            group.whole_experts = resolved.enable_expert_parallel
            return make(resolved, model_config, folder, own, group)

        # A runner sets torch's default, which all threads share, while it makes its model, and then sets what it
        # found: another thread would make the rest of its own in that. So it is set here, for all of them.
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, resolved.dtype))
        try:
            with (
                tempfile.TemporaryDirectory() as place,
                patch.object(torch, "set_default_dtype", lambda dtype: None),
            ):
                self.ranks = in_ranks(size, f"{place}/ranks", start, timeout_s=60.0, stats=stats)
        finally:
            torch.set_default_dtype(default_dtype)
        self._threads = ThreadPoolExecutor(size)
        self.num_blocks, self.kv_cache_bytes = (
            self.ranks[0].num_blocks,
            self.ranks[0].kv_cache_bytes,
        )

    def submit(self, plan: StepPlan) -> list[StepHandle]:
        return self._each(self.ranks, lambda rank: rank.submit(plan))

    def collect(self, handle: list[StepHandle]) -> tuple[list[int], list[TokenLogprobs] | None]:
        first, *others = (rank.collect(part) for rank, part in zip(self.ranks, handle, strict=True))
        for other in others:
            assert other[0] == first[0], (
                f"ranks sampled different tokens: {first[0]} and {other[0]}"
            )
        return first

    def close(self) -> None:
        self._threads.shutdown()
        self.ranks.clear()

    def _each(self, items: Iterable[Any], work: Callable[[Any], Any]) -> list[Any]:
        return list(self._threads.map(work, items))


def in_place_of_processes() -> Any:
    """A context in which engines with several ranks get them in threads."""
    return patch.object(workers, "TensorParallelRunner", RanksInThreads)


class _Enough(BaseException):
    """Ends a start of which enough was seen."""


def meeting_places(model: Path, engines: int) -> list[str]:
    """Where the ranks of several engines meet that are started side by side; each start ends with
    its first rank.
    """
    places: list[str] = []

    def record(rank: int, rendezvous: str, *_: Any) -> None:
        places.append(rendezvous)
        if len(places) < engines:
            start()
        raise _Enough

    def start() -> None:
        config = EngineConfig(
            model=str(model), device="cpu", optimizations=Optimizations(tensor_parallel_size=2)
        )
        resolved = config.resolve(device="cpu", dtype="float32", max_position_embeddings=4096)
        with contextlib.suppress(_Enough):
            workers.TensorParallelRunner(resolved, load_hf_config(model), model, StepStats())

    with patch.object(workers, "Child", MagicMock()), patch.object(workers, "Job", record):
        start()
    return places
