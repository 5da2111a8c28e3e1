"""all_reduce=symmetric_memory: small sums over memory that every GPU of a host can read. Loaded
only when on.

A library's all-reduce uses protocols and channels that pay off for large messages; a decode step
has small ones, two per layer. Here each rank copies its part into a buffer that its peers have
mapped, and one kernel reads all of them:

    one-shot   every rank reads every part and sums all of it                     (size - 1) * n bytes
    two-shot   every rank sums a slice and writes the sums into all buffers       2 * (size - 1) / size * n bytes

The kernels are those of torch.distributed._symmetric_memory. Messages larger than the buffer go
through the library. NVLink multicast is not used.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

ONE_SHOT_BYTES = 1 << 18
"""Messages up to this size are summed in one shot. Measured between two H200 (ablations/LOG.md): at
512 KiB both ways take equally long. More ranks were not measured.
"""
LARGEST_BYTES = 1 << 23
"""The largest message that is summed here: 40.8 us against the library's 49.7 between two H200.
Larger ones were not measured.
"""


class SymmetricAllReduce:
    """The buffers of one rank. All ranks must construct it together. Raises RuntimeError where GPUs
    cannot access each other's memory.
    """

    def __init__(self, device: torch.device, largest_bytes: int = LARGEST_BYTES) -> None:
        group = dist.group.WORLD
        self.size, self.name, self.largest_bytes = (
            dist.get_world_size(),
            group.group_name,
            largest_bytes,
        )
        try:
            self.memory = symm_mem.empty(largest_bytes, dtype=torch.uint8, device=device)
            self.handle = symm_mem.rendezvous(self.memory, group)
        except RuntimeError as error:
            raise RuntimeError(
                "all_reduce='symmetric_memory' needs GPUs of one host that can access each other's memory "
                f"({error}): use all_reduce='library'"
            ) from error

    def takes(self, x: Tensor) -> bool:
        """Whether x is small enough and consists of whole 16-byte words per rank."""
        return x.nbytes <= self.largest_bytes and x.nbytes % (16 * self.size) == 0 and x.nbytes > 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, as a new tensor or in x itself. Enqueued; nothing waits."""
        x = x.contiguous()
        buffer = self.memory[: x.nbytes].view(x.dtype)
        # one_shot_all_reduce_copy would save a kernel, but signals its peers while other warps of a
        # block may still be copying.
        buffer.copy_(x.view(-1))
        if x.nbytes <= ONE_SHOT_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", self.name).view(x.shape)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self.name)
        x.view(-1).copy_(buffer)
        return x
