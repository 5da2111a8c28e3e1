"""ModelRunner on a GPU: plans memory before it loads weights, and reads tokens back without blocking the stream."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import KVCacheSpec
from nanovllm.engine.model_runner import ModelRunner, StepHandle
from nanovllm.engine.sequence import TokenLogprobs
from nanovllm.gpu.memory_plan import MemoryPlan
from nanovllm.gpu.workspaces import Workspaces
from nanovllm.models.config import ModelConfig


class CopiedStep(StepHandle):
    """Results that are being copied to the host, and when they have arrived."""

    arrived: torch.cuda.Event


class GpuRunner(ModelRunner):
    """The interface of ModelRunner. Raises MemoryError before the weights are loaded where they do not fit.

    Where its configuration says device='cpu' (tests replay captured steps there), it does what ModelRunner does.
    """

    workspaces: ClassVar[Workspaces] = Workspaces()

    def before_the_weights(self, model: ModelConfig) -> None:
        """Checks that the weights fit, and starts to compile the kernels of the first steps meanwhile."""
        on = self.config.optimizations
        if on.kv_cache_dtype != "auto":
            from nanovllm.quantization.kv_cache import SmallCacheAttention

            self.attention = SmallCacheAttention.of(self, model)
        if self.config.device != "cuda":
            return
        self.memory_plan = MemoryPlan(self, model)
        # a rehearsal would compile kernels for weights and caches that are not quantized
        exact = on.quantization == "none" and on.kv_cache_dtype == "auto"
        if on.kernels == "triton" and exact:
            from nanovllm.gpu.rehearsal import Rehearsal

            self.rehearsal = Rehearsal(self, model)

    def make_rows(self) -> None:
        """Called when the weights are loaded."""
        super().make_rows()
        on = self.config.optimizations
        if on.quantization != "none":
            from nanovllm.quantization.layers import quantize_weights

            quantize_weights(self.model, self.kernels, on, self.tp, self.stats.kernel_calls)

    def most_blocks(self, spec: KVCacheSpec) -> int:
        """KV blocks that fit beside the weights and the largest step."""
        if self.config.device != "cuda":
            return super().most_blocks(spec)
        self.workspaces.keep_for(self.model)
        return self.memory_plan.num_blocks(self, spec)

    def _read_back(self, *tensors: Tensor) -> StepHandle:
        """Enqueues copies to the host, and an event that tells when they have arrived, however much is enqueued
        after them.
        """
        copies = super()._read_back(*tensors)
        if self.device.type != "cuda":
            return copies
        handle = CopiedStep(copies)
        handle.arrived = torch.cuda.current_stream().record_event()
        return handle

    def collect(self, handle: StepHandle) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Waits until the step's results have arrived; see ModelRunner.collect."""
        if isinstance(handle, CopiedStep):
            handle.arrived.synchronize()
        return super().collect(handle)

    def close(self) -> None:
        """Drops model and cache, and gives the memory back to the device."""
        super().close()
        torch.cuda.empty_cache()
