"""ModelRunner on a CPU: with quantization or kernels=native, weights are quantized or packed once they are loaded; with
overlap, steps run in a thread of their own.

Products and attention release the GIL, so while that thread computes a step, the engine's own thread commits the last
one, plans the next and takes requests.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import TokenLogprobs
from nanovllm.models.config import ModelConfig


class CpuRunner(ModelRunner):
    """The interface of ModelRunner."""

    thread: ThreadPoolExecutor | None = None

    def before_the_weights(self, model_config: ModelConfig) -> None:
        self.head_dim = model_config.head_dim
        if self.config.optimizations.kv_cache_dtype != "auto":
            from nanovllm.quantization.kv_cache import SmallCacheAttention

            self.attention = SmallCacheAttention.of(self, model_config)

    def make_rows(self) -> None:
        """Called when the weights are loaded."""
        super().make_rows()
        on = self.config.optimizations
        if on.quantization != "none":
            from nanovllm.quantization.layers import quantize_weights

            quantize_weights(self.model, self.kernels, on, self.tp, self.stats.kernel_calls)
        if on.kernels == "native":
            from nanovllm.cpu.packed_layers import pack_weights

            pack_weights(self.model, self.kernels, self.head_dim, whole=self.tp.size == 1)
        if on.overlap and self.tp.size == 1:
            # the number of threads that compute is a thread's own setting
            threads = torch.get_num_threads()
            self.thread = ThreadPoolExecutor(1, "nanovllm-step", torch.set_num_threads, (threads,))

    def submit(self, plan: StepPlan) -> Any:
        """The handle is a future where steps run in a thread."""
        if self.thread is None:
            return super().submit(plan)
        return self.thread.submit(super().submit, plan)

    def collect(self, handle: Any) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Raises what the step raised."""
        return super().collect(handle.result() if isinstance(handle, Future) else handle)

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown()
        super().close()
