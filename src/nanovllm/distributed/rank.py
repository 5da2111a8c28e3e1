"""One tensor-parallel rank: a process that holds a shard, runs the plans that it is sent and, on
rank 0, sends the tokens back.

Two threads submit steps and wait for their tokens: plan n + 1 is submitted while step n is on the
device.
"""

import gc
import marshal
import mmap
import pickle
import queue
import sys
import threading
from typing import Any

import torch

from nanovllm.distributed.collectives import DistributedTensorParallel
from nanovllm.distributed.processes import report_failure
from nanovllm.distributed.wire import Channel, Job, PlanCoder, counts_of
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.stats import StepStats
from nanovllm.toggles.counters import reset


def main(channel: Channel) -> None:
    """Entry point of a rank's process; returns when the channel closes."""
    # the thread that sends tokens back must not wait long for the one that submits steps
    sys.setswitchinterval(0.0005)
    Rank(channel).run()


class Rank:
    """Loads its shard on construction, runs steps in `run`."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        job: Job = pickle.loads(channel.receive())  # from our own engine, over an anonymous socket
        torch.set_num_threads(job.num_threads)
        with open(job.progress, "r+b") as file:
            # [2 * ranks]: plans, collectives
            self.progress: Any = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.rank, self.stats = job.rank, StepStats()
        channel.send(b"imported")
        channel.receive()  # every rank has reached this point; from here on they wait for each other
        on = job.resolved.optimizations
        make_runner: type[ModelRunner] = ModelRunner
        if job.resolved.device == "cuda":
            from nanovllm.gpu.cuda_graph import GraphRunner
            from nanovllm.gpu.machine import check_capability
            from nanovllm.gpu.runner import GpuRunner

            check_capability(job.rank)
            make_runner = GraphRunner if on.cuda_graphs else GpuRunner
        elif on.kernels == "native":
            from nanovllm.cpu.runner import CpuRunner

            make_runner = CpuRunner
        self.group = DistributedTensorParallel(
            job.rank,
            on.tensor_parallel_size,
            job.rendezvous,
            job.resolved.device,
            on,
            self.stats,
            self.progress,
            job.timeout_s,
        )
        self.group.whole_experts = job.resolved.enable_expert_parallel
        self.runner = make_runner(
            job.resolved, job.model_config, job.folder, self.stats, self.group
        )
        reset(self.stats)
        gc.collect()
        # as in the engine's own process: a rank that collects garbage delays the others
        gc.freeze()
        channel.send(b"ready" + marshal.dumps((self.runner.num_blocks, self.runner.kv_cache_bytes)))

    def run(self) -> None:
        """Runs plans until the channel closes. Raises what a step raises."""
        coder, handles = PlanCoder(), queue.SimpleQueue[Any]()
        if self.rank == 0:
            threading.Thread(target=self._send_back, args=(handles,), daemon=True).start()
        try:
            while True:
                handle = self.runner.submit(coder.decode(self.channel.receive()))
                self.progress[2 * self.rank] += 1
                if self.rank == 0:
                    handles.put((handle, counts_of(self.stats)))
        except EOFError:
            self.runner.close()  # captured steps hold the group's operations
            self.group.close()
            raise

    def _send_back(self, handles: Any) -> None:
        try:
            while True:
                handle, counts = handles.get()
                self.channel.send(b"tokens" + marshal.dumps((*self.runner.collect(handle), counts)))
        except ConnectionError:
            pass
        except BaseException:  # noqa: BLE001
            report_failure(self.channel)
