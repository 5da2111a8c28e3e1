"""The size of the KV cache, and its tensors."""

from dataclasses import dataclass
from typing import Self

import psutil
import torch
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.host_limits import memory_within
from nanovllm.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The shape of one rank's share of the cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: ModelConfig, config: ResolvedConfig) -> Self:
        return cls(
            model.num_hidden_layers,
            model.num_key_value_heads // config.optimizations.tensor_parallel_size,
            model.head_dim,
            config.block_size,
            torch.float8_e4m3fn
            if config.optimizations.kv_cache_dtype == "fp8_e4m3"
            else getattr(torch, config.dtype),
        )

    @property
    def block_bytes(self) -> int:
        return (
            2
            * self.num_layers
            * self.num_kv_heads
            * self.head_dim
            * self.block_size
            * self.dtype.itemsize
        )

    def allocate(self, num_blocks: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of each layer: [num_blocks, kv_heads, block_size, head_dim]. Raises
        MemoryError, saying what to lower.
        """
        try:
            cache = torch.zeros(
                (self.num_layers, 2, num_blocks, self.num_kv_heads, self.block_size, self.head_dim),
                dtype=self.dtype,
                device=device,
            )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise MemoryError(
                f"no room on {device} for {num_blocks} KV blocks of {self.block_bytes} bytes: "
                "lower kv_cache_memory_bytes or gpu_memory_utilization"
            ) from error
        return [(layer[0], layer[1]) for layer in cache]


def num_blocks_for(config: ResolvedConfig, spec: KVCacheSpec) -> int:
    """Blocks that fit into the byte budget: kv_cache_memory_bytes where it is given. Otherwise, on
    a CPU, the free memory minus the share that gpu_memory_utilization leaves to others, but at most
    what max_num_seqs requests of max_model_len tokens can fill. (memory_plan.py plans a GPU's
    memory.)

    Raises ValueError where not even one block fits.
    """
    if (budget := config.kv_cache_memory_bytes) is None:
        free, total = memory_within(*psutil.virtual_memory()[1::-1])  # what this process may use
        budget = min(
            int(free - (1 - config.gpu_memory_utilization) * total),
            config.max_num_seqs * -(-config.max_model_len // config.block_size) * spec.block_bytes,
        )
    if budget < spec.block_bytes:
        raise ValueError(
            f"the KV cache would have {max(budget, 0)} bytes, one block of {config.block_size} tokens takes "
            f"{spec.block_bytes}: raise kv_cache_memory_bytes or gpu_memory_utilization, or free memory"
        )
    return budget // spec.block_bytes
