"""tensor_parallel_size > 1: one process a rank, fed with flat StepPlans. Loaded only when on.

    engine's process   schedules, commits; no model, no GPU
        plan  ---socketpair---> rank 0 .. n-1      each launches the same steps on its shard and samples the same tokens
        tokens <--socketpair--- rank 0

Ranks sum over gloo (CPU), NCCL or symmetric memory (GPU): collectives.py. A rank ends when its lifeline closes, however the
engine's process died. A rank that dies or hangs ends the engine with an error that names it; as the engine's process holds no
GPU memory and waits for no device, ending all ranks gives everything back, whatever a kernel is still waiting for.
"""

import contextlib
import marshal
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from nanovllm.config import ResolvedConfig
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import TokenLogprobs
from nanovllm.engine.stats import StepStats
from nanovllm.engine.wire import Channel, Counts, Job, PlanCoder
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import ModelConfig

COLLECTIVE_TIMEOUT_S = 20.0
"""Ranks of which none has moved for this long, while a step is being computed, hang."""
START_TIMEOUT_S = 600.0
_LOOK_EVERY_S = 0.2
START_RANK = "from nanovllm.engine.rank import main; main()"


class WorkerError(RuntimeError):
    """A tensor-parallel rank died, hung or failed; the message names it."""


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    channel: Channel
    lifeline: int  # our end; the rank ends when it is closed
    said: str = ""  # of its failure


class TensorParallelRunner:
    """The interface of ModelRunner over all ranks. Raises WorkerError when a rank dies or does not answer."""

    def __init__(self, resolved: ResolvedConfig, model_config: ModelConfig, folder: Path, stats: StepStats) -> None:
        self.size = resolved.optimizations.tensor_parallel_size
        if resolved.device == "cuda" and torch.cuda.device_count() < self.size:
            raise ValueError(f"tensor_parallel_size={self.size} needs as many GPUs; there are {torch.cuda.device_count()}")
        ranks = TensorParallel()
        ranks.size = self.size
        ranks.share(model_config.num_attention_heads, "query heads")  # said before any process is started
        ranks.share(model_config.num_key_value_heads, "KV heads")
        self.stats = stats
        self._counted: Counts = (0, {}, {}, {})
        self._coder = PlanCoder()
        self._folder = tempfile.TemporaryDirectory(prefix="nanovllm-")
        self._children: dict[int, _Child] = {}
        self._timeout_s = COLLECTIVE_TIMEOUT_S
        self._progress = _shared_counters(os.path.join(self._folder.name, "progress"), 2 * self.size)
        self._moved: tuple[float, list[int]] = (time.monotonic(), [])
        num_threads = max(1, torch.get_num_threads() // self.size)
        try:
            for rank in range(self.size):
                self._start(Job(rank, os.path.join(self._folder.name, "rendezvous"), os.path.join(self._folder.name, "progress"),
                                num_threads, self._timeout_s, resolved, model_config, folder))  # fmt: skip
            self._await_all("imported")
            for child in self._children.values():
                child.channel.send(b"go on")
            self.num_blocks, self.kv_cache_bytes = marshal.loads(self._await_all("ready"))
        except BaseException as error:
            failure = self._failure(error)
            self.close(force=True)
            raise failure from error

    def launch(self, plan: StepPlan) -> int:
        """Sends the plan to every rank; the handle is the step's number."""
        try:
            message = self._coder.encode(plan)
            for child in self._children.values():
                child.channel.send(message, self._timeout_s)
        except OSError as error:
            raise self._failure(error) from error
        self._moved = time.monotonic(), []
        return plan.step

    def collect(self, handle: int) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Waits for a step's tokens, looking after the ranks meanwhile."""
        try:
            while (message := self._hear(0, b"tokens", _LOOK_EVERY_S)) is None:
                self._look_after_ranks()
        except (WorkerError, OSError) as error:
            raise self._failure(error) from error
        tokens, logprobs, counts = marshal.loads(message)
        self._count(counts)
        return tokens, logprobs

    def close(self, force: bool = False) -> None:
        """Ends every rank: asked to first (unless force), killed after five seconds."""
        for child in self._children.values():
            child.channel.close()
            if force:
                child.process.kill()
        deadline = time.monotonic() + 5
        for child in self._children.values():
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            os.close(child.lifeline)
        self._children.clear()
        self._folder.cleanup()

    def _start(self, job: Job) -> None:
        ours, theirs = socket.socketpair()
        lifeline_theirs, lifeline_ours = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-c", START_RANK, str(theirs.fileno()), str(lifeline_theirs)],
            pass_fds=[theirs.fileno(), lifeline_theirs], stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        theirs.close()
        os.close(lifeline_theirs)
        self._children[job.rank] = _Child(process, Channel(ours), lifeline_ours)
        self._children[job.rank].channel.send(pickle.dumps(job), START_TIMEOUT_S)

    def _hear(self, rank: int, word: bytes, timeout_s: float) -> bytes | None:
        """What a rank says after `word`, None while it is silent. Raises WorkerError where it has ended or failed."""
        child = self._children[rank]
        try:
            message = child.channel.receive(timeout_s)
        except TimeoutError:
            if child.process.poll() is None:
                return None
            raise WorkerError(f"tensor-parallel rank {rank} ended") from None
        except (EOFError, OSError):
            raise WorkerError(f"tensor-parallel rank {rank} ended") from None
        if message.startswith(b"failed:"):
            child.said = message[7:].decode()
        if not message.startswith(word):
            raise WorkerError(f"tensor-parallel rank {rank} {message[:200].decode(errors='replace')}")
        return message[len(word) :]

    def _await_all(self, word: str) -> bytes:
        """Waits until every rank has said `word`; what rank 0 said after it. Raises WorkerError where one does not."""
        deadline, answers = time.monotonic() + START_TIMEOUT_S, dict[int, bytes]()
        while waiting := [rank for rank in self._children if rank not in answers]:
            for rank in waiting:
                answer = self._hear(rank, word.encode(), _LOOK_EVERY_S / len(waiting))
                if answer is not None:
                    answers[rank] = answer
            if time.monotonic() > deadline:
                raise WorkerError(f"tensor-parallel rank {waiting[0]} was not {word} within {START_TIMEOUT_S:.0f} s")
        return answers[0]

    def _look_after_ranks(self) -> None:
        """Raises WorkerError where a rank has ended or failed, or all stand still."""
        for rank in range(1, self.size):
            self._hear(rank, b"nothing", 0.0)
        moved_at, seen = self._moved
        if seen != (now := list(self._progress)):
            self._moved = time.monotonic(), now
        elif time.monotonic() - moved_at > self._timeout_s + 2:  # gloo's own limit comes first, and says more
            raise WorkerError(f"no tensor-parallel rank has moved for {self._timeout_s:.0f} s")

    def _failure(self, error: BaseException) -> BaseException:
        """The error to raise: the dead, failed or hung rank by name where there is one, else what was caught.

        When one rank goes, the others fail or wait as well, in an operation that it has not entered: it is the one behind.
        """
        if not isinstance(error, (WorkerError, OSError)):
            return error
        time.sleep(_LOOK_EVERY_S)  # a rank that just failed needs a moment to say why, and to end
        for rank in self._children:
            with contextlib.suppress(WorkerError):
                self._hear(rank, b"", 0.0)
        for rank, child in self._children.items():
            if (status := child.process.poll()) is not None and status < 0:
                return WorkerError(f"tensor-parallel rank {rank} was killed ({signal.Signals(-status).name})")
        at = {rank: (self._progress[2 * rank], self._progress[2 * rank + 1]) for rank in self._children}
        silent = [rank for rank, child in self._children.items() if _is_stopped(child.process)]
        silent = silent or [rank for rank in self._children if at[rank] < max(at.values())]
        failed = [rank for rank, child in self._children.items() if child.said or child.process.poll() is not None]
        first = min(silent or failed or [-1], key=lambda rank: at.get(rank, (0, 0)))
        if first in failed:
            child = self._children[first]
            return WorkerError(f"tensor-parallel rank {first} failed:\n{child.said}" if child.said else
                               f"tensor-parallel rank {first} ended without a word, status {child.process.returncode}")  # fmt: skip
        if first in silent:
            return WorkerError(f"tensor-parallel rank {first} hangs: it did not answer within {self._timeout_s:.0f} s ({error})")
        return WorkerError(f"{error}: ranks 0 to {self.size - 1} have launched the same step, and none has finished it")

    def _count(self, counts: Counts) -> None:
        """Adds to the engine's counters what rank 0 has counted since the last step."""
        before, self._counted = self._counted, counts
        self.stats.graph_replays += counts[0] - before[0]
        names = "all_reduces", "attention_calls", "kernel_calls"
        for name, now, then in zip(names, counts[1:], before[1:], strict=True):
            getattr(self.stats, name).update({key: n - then.get(key, 0) for key, n in now.items()})


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _shared_counters(path: str, count: int) -> Any:
    """[count] uint64 that the ranks write and the engine reads."""
    with open(path, "w+b") as file:
        file.truncate(8 * count)
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
