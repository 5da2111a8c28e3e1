"""How an engine divides a GPU's memory; planned before the weights are loaded. Loaded only on a
GPU.

    total  | others | this engine: weights, code | a step | KV cache | kept free |
                    |<------- at most gpu_memory_utilization of total ->|

gpu_memory_utilization is the share of the whole memory that this engine may use, as in vLLM, so two
engines with 0.45 fit together. If other processes leave less than that, the engine uses what is
free minus `kept_free_bytes`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re

import torch

from nanovllm.engine.kv_cache import KVCacheSpec, num_blocks_for
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.gpu.step_memory import bytes_for_steps
from nanovllm.models.config import ModelConfig
from nanovllm.models.families import model_class

LOG = logging.getLogger("nanovllm")

KEPT_FREE_BYTES = 512 << 20
"""Left free on a GPU that others use too, such as a desktop. Less where gpu_memory_utilization
leaves less.
"""


def memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a GPU, over all processes."""
    return torch.cuda.mem_get_info(device)


class MemoryPlan:
    """Made before the weights are loaded. Raises MemoryError where they do not fit, with what
    helps.
    """

    def __init__(self, runner: ModelRunner, model: ModelConfig) -> None:
        self.config, self.device = runner.config, runner.device
        self.free_bytes, self.total_bytes = memory(runner.device)
        self.weights_bytes = weights_bytes(runner, model)
        self.num_kv_heads, self.num_ranks = model.num_key_value_heads, runner.tp.size
        self.longest = model.max_position_embeddings
        if self.weights_bytes > min(self.free_bytes, self.allowed_bytes):
            raise MemoryError(self._weights_do_not_fit())

    @property
    def allowed_bytes(self) -> int:
        """Bytes that this engine may use. An explicit kv_cache_memory_bytes replaces the limit of
        gpu_memory_utilization.
        """
        share = (
            1.0
            if self.config.kv_cache_memory_bytes is not None
            else self.config.gpu_memory_utilization
        )
        return int(share * self.total_bytes)

    @property
    def kept_free_bytes(self) -> int:
        return min(KEPT_FREE_BYTES, self.total_bytes - self.allowed_bytes)

    def num_blocks(self, runner: ModelRunner, spec: KVCacheSpec) -> int:
        """KV blocks of an engine whose weights are loaded: as many as kv_cache_memory_bytes holds
        where it is given; otherwise what the plan leaves when a step has its memory, at most what
        max_num_seqs requests of max_model_len tokens can fill.

        Raises ValueError where that cannot hold one request of max_model_len tokens. It is only a
        warning where max_model_len is the model's own limit, which few requests reach: the engine
        then refuses those that do.
        """
        step_bytes = bytes_for_steps(runner, spec)
        if self.config.kv_cache_memory_bytes is not None:
            return num_blocks_for(self.config, spec)
        free_now, _ = memory(self.device)
        taken = self.free_bytes - free_now
        room = min(self.allowed_bytes - taken, free_now - self.kept_free_bytes) - step_bytes
        one_request = -(-self.config.max_model_len // spec.block_size)
        if room < one_request * spec.block_bytes:
            said = self._request_does_not_fit(
                room, free_now - step_bytes, step_bytes, one_request, spec
            )
            if self.config.max_model_len < self.longest or room < spec.block_bytes:
                raise ValueError(said)
            LOG.warning("longer requests will be refused: %s", said)
        return min(room // spec.block_bytes, self.config.max_num_seqs * one_request)

    def _weights_do_not_fit(self) -> str:
        each = " on each GPU" if self.num_ranks > 1 else ""
        lines = [
            f"the weights take {_gib(self.weights_bytes)} in {self.config.dtype}{each}",
            f"of {_gib(self.total_bytes)} on {self.device} {_gib(self.free_bytes)} are free",
        ]
        if self.allowed_bytes < self.total_bytes:
            lines.append(
                f"gpu_memory_utilization={self.config.gpu_memory_utilization:g} allows {_gib(self.allowed_bytes)}"
            )
        lines += self._others()
        ways = []
        if (
            self.weights_bytes > self.free_bytes
            and self.weights_bytes < self.total_bytes - self.kept_free_bytes
        ):
            ways.append(f"free {_gib(self.weights_bytes - self.free_bytes)} or more on that GPU")
        if self.allowed_bytes < self.weights_bytes <= self.free_bytes:
            ways.append(
                f"raise gpu_memory_utilization to more than {_up(self.weights_bytes / self.total_bytes)}"
            )
        fits = 0.9 * min(self.free_bytes, self.allowed_bytes)  # leave something for the KV cache
        if self.config.dtype == "float32" and self.weights_bytes / 2 <= fits:
            ways.append(f"dtype='bfloat16' ({_gib(self.weights_bytes // 2)})")
        whole = self.weights_bytes * self.num_ranks
        ranks = [
            n
            for n in (2, 4, 8)
            if n > self.num_ranks and self.num_kv_heads % n == 0 and whole / n <= fits
        ]
        if ranks:
            ways.append(
                f"tensor_parallel_size={ranks[0]} on as many GPUs ({_gib(whole // ranks[0])} on each)"
            )
        ways.append("a smaller model, or a GPU with more memory")
        return "; ".join(lines) + ". What helps: " + "; ".join(ways)

    def _others(self) -> list[str]:
        """Who else holds memory of this GPU, as far as it is known: processes of other containers
        are not listed.
        """
        ours = torch.cuda.memory_reserved(self.device)
        held = [
            f"{_gib(self.total_bytes - self.free_bytes - ours)} are held by other processes and the driver"
        ]
        if ours:
            held.append(f"{_gib(ours)} by PyTorch in this process (another engine? close it)")
        processes = ""
        # NVML may be missing or refuse: that must not hide the error about memory
        with contextlib.suppress(Exception):
            processes = torch.cuda.list_gpu_processes(self.device)
        named = [
            f"process {pid} {size} MiB"
            for pid, size in re.findall(r"process\s+(\d+) uses\s+(\d+)[.\d]* MB", processes)
            if int(pid) != os.getpid()
        ]
        return held + ([f"among them {', '.join(named[:5])}"] if named else [])

    def _request_does_not_fit(
        self, room: int, free_after_step: int, step_bytes: int, one_request: int, spec: KVCacheSpec
    ) -> str:
        config = self.config
        needed, tokens = (
            one_request * spec.block_bytes,
            max(0, room) // spec.block_bytes * spec.block_size,
        )
        ways = []
        if tokens:
            ways.append(f"max_model_len={tokens} or less")
        share = _up((self.allowed_bytes + needed - room) / self.total_bytes)
        if share <= 1 and needed <= free_after_step - min(
            KEPT_FREE_BYTES, int((1 - share) * self.total_bytes)
        ):
            ways.append(
                f"gpu_memory_utilization={share} or more instead of {config.gpu_memory_utilization:g}"
            )
        if needed - room < step_bytes // 2:
            ways.append(
                f"max_num_batched_tokens or max_num_seqs lower than {config.max_num_batched_tokens} and "
                f"{config.max_num_seqs} (a step takes {_gib(step_bytes)})"
            )
        ways.append("more free memory on that GPU, or tensor_parallel_size to share it out")
        return (
            f"the KV cache would hold {tokens:,} tokens ({_gib(max(0, room))}), and one request of max_model_len="
            f"{config.max_model_len} takes {_gib(needed)}: of {_gib(self.total_bytes)} on {self.device} "
            f"{_gib(self.free_bytes)} were free, the weights take {_gib(self.weights_bytes)}, a step {_gib(step_bytes)}. "
            f"What helps: {'; '.join(ways)}"
        )


def weights_bytes(runner: ModelRunner, model: ModelConfig) -> int:
    """Bytes of this rank's share of the weights, from the model built on the meta device, without
    memory.
    """
    with torch.device("meta"):
        built = model_class(model.architecture)(
            model, 1, runner.kernels, runner.attention, runner.tp
        )
    itemsize: int = getattr(torch, runner.config.dtype).itemsize
    return sum(parameter.numel() for parameter in built.parameters()) * itemsize


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _up(share: float) -> float:
    """Rounded up to two decimals."""
    return math.ceil(share * 100 - 1e-9) / 100
