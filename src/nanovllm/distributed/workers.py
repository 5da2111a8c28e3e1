"""tensor_parallel_size > 1: one process per rank, fed with flat StepPlans. Loaded only when on.

    engine's process   schedules, commits; no model, no GPU
        plan  ---socketpair---> rank 0 .. n-1      each computes the same steps on its shard and samples the same tokens
        tokens <--socketpair--- rank 0

Ranks sum over gloo (CPU), NCCL or symmetric memory (GPU): collectives.py. A rank ends when its
lifeline closes, however the engine's process ended. A rank that dies or hangs ends the engine with
an error that names it. The engine's process holds no GPU memory and waits for no device, so ending
all ranks frees everything, whatever a kernel is still waiting for.
"""

import contextlib
import marshal
import mmap
import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import ResolvedConfig
from nanovllm.distributed.processes import Child, WorkerError, end
from nanovllm.distributed.wire import Counts, Job, PlanCoder
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import TokenLogprobs
from nanovllm.engine.stats import StepStats
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import ModelConfig

COLLECTIVE_TIMEOUT_S = 20.0
"""Ranks hang if none of them has made progress for this long while a step is computed."""
COMPILE_TIMEOUT_S = 300.0
"""The same limit with kernels=compile: a rank makes no progress while it compiles, which its first
steps do, and which takes long on a busy machine.
"""
START_TIMEOUT_S = 600.0
RANK_MAIN = "nanovllm.distributed.rank.main"
_LOOK_EVERY_S = 0.2


class TensorParallelRunner:
    """The interface of ModelRunner over all ranks. Raises WorkerError when a rank dies or does not
    answer.
    """

    def __init__(
        self, resolved: ResolvedConfig, model_config: ModelConfig, folder: Path, stats: StepStats
    ) -> None:
        self.size = resolved.optimizations.tensor_parallel_size
        if resolved.enable_expert_parallel:
            check_expert_parallel(model_config, self.size)
        ranks = TensorParallel()
        ranks.size = self.size
        # raises before any process is started
        ranks.share(model_config.num_attention_heads, "query heads")
        ranks.share(model_config.num_key_value_heads, "KV heads")
        self.stats = stats
        self._counted: Counts = (0, {}, {}, {})
        self._coder = PlanCoder()
        self._folder = tempfile.TemporaryDirectory(prefix="nanovllm-")
        self._children: list[Child] = []
        self._broken = False
        self._timeout_s = (
            COMPILE_TIMEOUT_S
            if resolved.optimizations.kernels == "compile"
            else COLLECTIVE_TIMEOUT_S
        )
        self._progress = _shared_counters(
            os.path.join(self._folder.name, "progress"), 2 * self.size
        )
        self._moved: tuple[float, list[int]] = (time.monotonic(), [])
        num_threads = max(1, torch.get_num_threads() // self.size)
        try:
            for rank in range(self.size):
                self._children.append(Child(f"tensor-parallel rank {rank}", RANK_MAIN))
                job = Job(
                    rank,
                    os.path.join(self._folder.name, "rendezvous"),
                    os.path.join(self._folder.name, "progress"),
                    num_threads,
                    self._timeout_s,
                    resolved,
                    model_config,
                    folder,
                )
                self._children[-1].channel.send(pickle.dumps(job), START_TIMEOUT_S)
            self._await_all(b"imported")
            for child in self._children:
                child.channel.send(b"go on")
            self.num_blocks, self.kv_cache_bytes = marshal.loads(self._await_all(b"ready"))
        except BaseException as error:
            failure = self._failure(error)
            self.close(force=True)
            raise failure from error

    def submit(self, plan: StepPlan) -> int:
        """Sends the plan to every rank; the handle is the number of the step."""
        try:
            message = self._coder.encode(plan)
            for child in self._children:
                child.channel.send(message, self._timeout_s)
        except OSError as error:
            raise self._failure(error) from error
        self._moved = time.monotonic(), []
        return plan.step

    def collect(self, handle: int) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Waits for a step's tokens, and watches the ranks meanwhile."""
        try:
            while (message := self._children[0].hear(b"tokens", _LOOK_EVERY_S)) is None:
                self._look_after_ranks()
        except (WorkerError, OSError) as error:
            raise self._failure(error) from error
        tokens, logprobs, counts = marshal.loads(message)
        self._count(counts)
        return tokens, logprobs

    def close(self, force: bool = False) -> None:
        """Ends every rank: killed if one has failed or `force` is set, else asked to end and killed
        soon after.
        """
        end(self._children, force or self._broken)
        self._children = []
        self._folder.cleanup()

    def _await_all(self, word: bytes) -> bytes:
        """Waits until every rank has sent `word`; returns what rank 0 sent after it. Raises
        WorkerError if one does not answer.
        """
        deadline, answers = time.monotonic() + START_TIMEOUT_S, dict[int, bytes]()
        while waiting := [rank for rank in range(self.size) if rank not in answers]:
            for rank in waiting:
                answer = self._children[rank].hear(word, _LOOK_EVERY_S / len(waiting))
                if answer is not None:
                    answers[rank] = answer
            if time.monotonic() > deadline:
                title = self._children[waiting[0]].title
                raise WorkerError(f"{title} was not {word.decode()} within {START_TIMEOUT_S:.0f} s")
        return answers[0]

    def _look_after_ranks(self) -> None:
        """Raises WorkerError where a rank has ended or failed, or none makes progress."""
        for child in self._children[1:]:
            child.hear(b"nothing", 0.0)
        moved_at, seen = self._moved
        now = list(self._progress)
        if seen != now:
            self._moved = time.monotonic(), now
        # gloo's own limit is shorter, and its error says more
        elif time.monotonic() - moved_at > self._timeout_s + 2:
            raise WorkerError(
                f"the tensor-parallel ranks 0 to {self.size - 1} hang: all have submitted the same step, and none has "
                f"finished it within {self._timeout_s:.0f} s"
            )

    def _failure(self, error: BaseException) -> BaseException:
        """The error to raise: it names the dead, failed or hung rank if there is one; else it is
        the error that was caught.

        When one rank stops, the others fail or wait too, in an operation that it has not entered:
        it is the one behind.
        """
        if not isinstance(error, (WorkerError, OSError)):
            return error
        self._broken = True
        time.sleep(_LOOK_EVERY_S)  # a rank that just failed needs a moment to say why, and to end
        for child in self._children:
            with contextlib.suppress(WorkerError):
                child.hear(b"", 0.0)
        if killed := [child for child in self._children if child.was_killed]:
            return WorkerError(killed[0].failure())
        at = [(self._progress[2 * rank], self._progress[2 * rank + 1]) for rank in range(self.size)]
        silent = [rank for rank, child in enumerate(self._children) if child.is_stopped]
        silent = silent or [rank for rank in range(self.size) if at[rank] < max(at)]
        failed = [rank for rank, child in enumerate(self._children) if child.has_failed]
        suspects = silent or failed
        if suspects:
            first = self._children[min(suspects, key=at.__getitem__)]
            if first.has_failed:
                return WorkerError(first.failure())
            self._show_where()
            return WorkerError(
                f"{first.title} hangs: it did not answer within {self._timeout_s:.0f} s ({error})"
            )
        self._show_where()
        return WorkerError(str(error))

    def _show_where(self) -> None:
        for child in self._children:
            child.show_where()
        time.sleep(_LOOK_EVERY_S)

    def _count(self, counts: Counts) -> None:
        """Adds to the engine's counters what rank 0 has counted since the last step."""
        before, self._counted = self._counted, counts
        self.stats.graph_replays += counts[0] - before[0]
        names = "all_reduces", "attention_calls", "kernel_calls"
        for name, now, then in zip(names, counts[1:], before[1:], strict=True):
            getattr(self.stats, name).update({key: n - then.get(key, 0) for key, n in now.items()})


def check_expert_parallel(model_config: ModelConfig, ranks: int) -> None:
    """Raises ValueError where there are no experts, or no ranks, to spread them over."""
    if not {"num_experts", "num_local_experts"} & model_config.own.keys():
        raise ValueError(
            f"enable_expert_parallel=True is for models with experts; {model_config.architecture} is dense: leave it out"
        )
    if ranks == 1:
        raise ValueError(
            "enable_expert_parallel=True needs tensor_parallel_size of 2 or more: one rank holds all experts; leave it out"
        )


def _shared_counters(path: str, count: int) -> Any:
    """[count] uint64 counters that the ranks write and the engine reads."""
    with open(path, "w+b") as file:
        file.truncate(8 * count)
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
