"""tensor_parallel_size > 1: one process a rank, fed with flat StepPlans. Loaded only when on.

Rank 0 is the engine's own process. Every other rank is a child that holds its shard, runs the same steps and samples the
same tokens (randomness is counter-based), so nothing but plans goes out and nothing comes back:

    rank 0   plan ---socketpair---> rank 1 .. n-1
             all-reduce / all-gather over gloo (CPU) or NCCL (GPU), loopback only

Ranks meet through a file in a private temporary folder: no port to choose, no name to guess, any number of engines a host.
A child ends when its socket closes, however the parent died. A child that dies or hangs ends the engine with an error.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.engine.model_runner import ModelRunner, StepHandle
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import TokenLogprobs
from nanovllm.engine.stats import StepStats
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import ModelConfig

COLLECTIVE_TIMEOUT_S = 30.0
"""A rank that has not joined a collective operation after this long is taken for dead."""
START_TIMEOUT_S = 600.0


class WorkerError(RuntimeError):
    """A tensor-parallel rank died, hung or failed; the message names it."""


class DistributedTensorParallel(TensorParallel):
    """The group of ranks, over a process group of its own: torch's global one is left to the user's program."""

    def __init__(self, rank: int, size: int, rendezvous: str, device: str, stats: StepStats) -> None:
        self.rank, self.size, self.stats = rank, size, stats
        store = dist.FileStore(rendezvous, size)
        if device == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
            torch.cuda.set_device(rank)
            self.group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
            options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
            options._threads = 2
            self.group = dist.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.stats.all_reduces += 1
        self.group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)

    def agree_on_least(self, value: int) -> int:
        parts = self.all_gather(torch.tensor([value], device="cuda" if "nccl" in self.group.name() else "cpu"))
        return int(parts.min())


@dataclass(frozen=True, slots=True)
class _Job:
    """What a child needs to become a rank."""

    rank: int
    rendezvous: str
    num_threads: int
    resolved: ResolvedConfig
    model_config: ModelConfig
    folder: Path


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
        self._threads_before = torch.get_num_threads()
        num_threads = max(1, self._threads_before // self.size)
        self._folder = tempfile.TemporaryDirectory(prefix="nanovllm-")
        self._children: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}
        self._local: ModelRunner | None = None
        rendezvous = os.path.join(self._folder.name, "rendezvous")
        try:
            for rank in range(1, self.size):
                self._start(_Job(rank, rendezvous, num_threads, resolved, model_config, folder))
            torch.set_num_threads(num_threads)
            self._await_all("imported")
            group = DistributedTensorParallel(0, self.size, rendezvous, resolved.device, stats)
            self._local = ModelRunner(resolved, model_config, folder, stats, group)
            self._await_all("ready")
        except BaseException as error:
            failure = self._failure(error)
            self.close(force=True)
            raise failure from error
        self.num_blocks, self.kv_cache_bytes = self._local.num_blocks, self._local.kv_cache_bytes

    def launch(self, plan: StepPlan) -> StepHandle:
        assert self._local is not None
        try:
            message = pickle.dumps(plan, protocol=pickle.HIGHEST_PROTOCOL)
            for _, connection in self._children.values():
                connection.send_bytes(message)
            return self._local.launch(plan)
        except (RuntimeError, OSError) as error:
            raise self._failure(error) from error

    def collect(self, handle: StepHandle) -> tuple[list[int], list[TokenLogprobs] | None]:
        assert self._local is not None
        try:
            return self._local.collect(handle)
        except RuntimeError as error:
            raise self._failure(error) from error

    def close(self, force: bool = False) -> None:
        """Ends every child: asked to first (unless force), killed after five seconds."""
        for child, connection in self._children.values():
            connection.close()
            if force:
                child.kill()
        for child, _ in self._children.values():
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()
        if self._local is not None:
            self._local.close()
            self._local = None
        torch.set_num_threads(self._threads_before)
        self._folder.cleanup()

    def _start(self, job: _Job) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-c", "from nanovllm.engine.workers import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        connection = Connection(ours.detach())
        self._children[job.rank] = (child, connection)
        connection.send_bytes(pickle.dumps(job))

    def _await_all(self, word: str) -> None:
        """Waits until every child has said `word`. Raises WorkerError if one dies, fails or is silent for too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        for rank, (child, connection) in self._children.items():
            while not connection.poll(0.2):
                if child.poll() is not None:
                    raise WorkerError(f"tensor-parallel rank {rank} ended with status {child.returncode} before it was {word}")
                if time.monotonic() > deadline:
                    raise WorkerError(f"tensor-parallel rank {rank} was not {word} within {START_TIMEOUT_S:.0f} s")
            try:
                said = connection.recv_bytes().decode()
            except EOFError as error:
                raise WorkerError(f"tensor-parallel rank {rank} ended before it was {word}") from error
            if said != word:
                raise WorkerError(f"tensor-parallel rank {rank} failed:\n{said}")

    def _failure(self, error: BaseException) -> BaseException:
        """The error to raise: the first dead or failed rank by name where there is one, else what was caught."""
        if isinstance(error, (WorkerError, ValueError, MemoryError)) or not isinstance(error, Exception):
            return error
        time.sleep(0.2)  # a child that just failed needs a moment to say why
        for rank, (child, _) in self._children.items():
            if child.poll() is not None and child.returncode < 0:  # the others only report that their peer is gone
                return WorkerError(f"tensor-parallel rank {rank} was killed ({signal.Signals(-child.returncode).name})")
        for rank, (_, connection) in self._children.items():
            try:
                if not connection.closed and connection.poll(0):
                    return WorkerError(f"tensor-parallel rank {rank} failed:\n{connection.recv_bytes().decode()}")
            except (EOFError, OSError):
                return WorkerError(f"tensor-parallel rank {rank} ended without a word")
        return WorkerError(f"a tensor-parallel rank did not answer within {COLLECTIVE_TIMEOUT_S:.0f} s: {error}")


def main() -> None:
    """A child rank: argv[1] is the number of its inherited socket. Ends when that socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(int(sys.argv[1]))
    try:
        job: _Job = pickle.loads(connection.recv_bytes())  # from our own parent, over an anonymous socket
        torch.set_num_threads(job.num_threads)
        connection.send_bytes(b"imported")
        size = job.resolved.optimizations.tensor_parallel_size
        stats = StepStats()
        group = DistributedTensorParallel(job.rank, size, job.rendezvous, job.resolved.device, stats)
        runner = ModelRunner(job.resolved, job.model_config, job.folder, stats, group)
        connection.send_bytes(b"ready")
        while True:
            runner.launch(pickle.loads(connection.recv_bytes()))
    except (EOFError, ConnectionError):
        return  # the parent closed the engine, or is gone
    except Exception:  # noqa: BLE001  whatever it was, the parent must hear of it
        try:
            connection.send_bytes(traceback.format_exc().encode())
        except OSError:
            sys.stderr.write(traceback.format_exc())
        sys.exit(1)
