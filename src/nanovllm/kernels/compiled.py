"""kernels=compile: torch.compile applied to each operation, here and nowhere else."""

import dataclasses
from typing import TypeVar

import torch

Kernels = TypeVar("Kernels")


def compile_kernels(kernels: Kernels) -> Kernels:
    """Compiled twins of a registry.Kernels, with symbolic batch sizes: one compilation serves every step.

    The sampler stays as it is: its random numbers are defined operation by operation in IEEE arithmetic, and a compiler
    that contracts a multiplication and an addition would change their last bits.
    """
    return dataclasses.replace(  # type: ignore[type-var]
        kernels,
        **{name: torch.compile(getattr(kernels, name), dynamic=True, fullgraph=True)
           for name in ("rms_norm", "add_rms_norm", "qk_norm_rope_store_kv", "silu_and_mul")},
    )  # fmt: skip
