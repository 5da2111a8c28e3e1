"""The group of tensor-parallel ranks: gloo on a CPU, NCCL on GPUs, loopback only. Loaded in ranks,
never in the engine's process.

Ranks meet through a file in the engine's private temporary folder, so there is no port or name to
choose and any number of engines can run on a host. On GPUs every operation is enqueued on the
current stream, so a CUDA graph captures it like any kernel.

Sampling does not need the logits of other ranks: each finds the best token of its part of the
vocabulary (the noise is a function of the token), and the ranks exchange 8 bytes per row and slice.
Logits are gathered only where top-k or top-p need the whole distribution, or log-probabilities are
asked for.
"""

import dataclasses
import os
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.config import Optimizations
from nanovllm.engine.stats import StepStats
from nanovllm.kernels.registry import Kernels, counted
from nanovllm.layers.linear import TensorParallel

GPU_ENVIRONMENT = {
    # NVLink multicast can leave a host's GPUs unusable for other processes, and nothing here needs it.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    # The engine notices and ends a rank that hangs; NCCL's own monitor would only delay the exit.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Environment of every rank, set before NCCL is loaded."""


class DistributedTensorParallel(TensorParallel):
    """One rank's view of the group. `progress` counts the operations that it has entered, in memory
    that the engine reads.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        rendezvous: str,
        device: str,
        optimizations: Optimizations,
        stats: StepStats,
        progress: Any,
        timeout_s: float,
    ) -> None:
        self.rank, self.size, self.stats, self.progress = rank, size, stats, progress
        self.kernels_level = optimizations.kernels
        self.device = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
        self.symmetric: Any = None
        store = dist.FileStore(rendezvous, size)
        if device == "cuda":
            os.environ.update(GPU_ENVIRONMENT)
            torch.cuda.set_device(self.device)
            # The engine limits the time of a step; NCCL's own limit is for the start, which includes
            # loading weights.
            dist.init_process_group(
                "nccl",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(minutes=10),
                device_id=self.device,
            )
            if optimizations.all_reduce == "symmetric_memory":
                from nanovllm.distributed.symmetric_memory import SymmetricAllReduce

                self.symmetric = SymmetricAllReduce(self.device)
            self.group: Any = dist.group.WORLD
        else:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
            options._timeout = timedelta(seconds=timeout_s)
            options._threads = 2
            self.group = dist.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.progress[2 * self.rank + 1] += 1
        if self.symmetric is not None and self.symmetric.takes(x):
            self.stats.all_reduces["symmetric_memory"] += 1
            return self.symmetric.all_reduce(x)
        self.stats.all_reduces["library"] += 1
        if x.is_cuda:
            dist.all_reduce(x)
        else:
            self.group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._gather(x).unbind(), dim=-1)

    def agree_on_least(self, value: int) -> int:
        return int(self._gather(torch.tensor([value], device=self.device)).min())

    def over_shards(self, kernels: Kernels) -> Kernels:
        """The same kernels, with a sampler that takes this rank's part of the logits: [n, vocab /
        size].
        """
        level = "triton" if self.kernels_level == "triton" else "torch"
        shards = import_module(f"nanovllm.kernels.{level}.sampling_shards")
        best_of_shard = counted(shards.best_of_shard, self.kernels_level, self.stats.kernel_calls)

        def sample(
            logits: Tensor,
            temperatures: Tensor,
            top_ks: Tensor,
            top_ps: Tensor,
            seeds: Tensor,
            positions: Tensor,
            *,
            all_greedy: bool,
            any_top_k_top_p: bool,
        ) -> Tensor:
            if any_top_k_top_p or logits.shape[1] % 4:  # random numbers are drawn in fours
                return kernels.sample(
                    self.all_gather(logits),
                    temperatures,
                    top_ks,
                    top_ps,
                    seeds,
                    positions,
                    all_greedy=all_greedy,
                    any_top_k_top_p=any_top_k_top_p,
                )
            if not len(logits):
                return positions
            best = best_of_shard(
                logits,
                temperatures,
                seeds,
                positions,
                self.rank * logits.shape[1],
                all_greedy=all_greedy,
            )
            return shards.best_of_shards(self._gather(best))

        return dataclasses.replace(kernels, sample=sample)

    def _gather(self, x: Tensor) -> Tensor:
        """Every rank's x: [size, *x.shape]."""
        self.progress[2 * self.rank + 1] += 1
        x = x.contiguous()
        if x.is_cuda:
            parts = x.new_empty(self.size, *x.shape)
            dist.all_gather_into_tensor(parts, x)
            return parts
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        self.group.allgather([gathered], [x]).wait()
        return torch.stack(gathered)

    def close(self) -> None:
        """Leaves the group. Graphs that captured its operations must have been freed before."""
        self.symmetric = self.group = None
        if dist.is_initialized():
            dist.destroy_process_group()
