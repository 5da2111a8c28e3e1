"""Translates vLLM's constructor arguments. Loaded only when one is given that this engine calls by
another name.
"""

import dataclasses
from typing import Any

from nanovllm.config import ALL, EngineConfig

SWITCHES = {
    "enable_prefix_caching": lambda on: {"prefix_cache": on},
    "disable_cascade_attn": lambda off: {"cascade_attention": False if off else "auto"},
    "enable_chunked_prefill": lambda on: {"batching": "chunked" if on else "continuous"},
    "enforce_eager": lambda on: {"cuda_graphs": False if on else "auto"},
    "async_scheduling": lambda on: {"overlap": on},
    "tensor_parallel_size": lambda degree: {"tensor_parallel_size": degree},
    "data_parallel_size": lambda degree: {"data_parallel_size": degree},
}
"""vLLM's name -> the fields of `Optimizations` that it sets; None leaves them as they are, as in vLLM."""


def translate(kwargs: dict[str, Any]) -> dict[str, Any]:
    """-> arguments of EngineConfig. Raises TypeError for an unknown argument, and where a switch is
    given twice; ValueError for a switch that is neither on nor off.
    """
    own = {f.name for f in dataclasses.fields(EngineConfig)} - {"model"}
    if unknown := sorted(set(kwargs) - own - set(SWITCHES)):
        raise TypeError(
            f"unknown argument {', '.join(unknown)}; known are {', '.join(sorted(own | set(SWITCHES)))}"
        )
    given = [name for name in kwargs if name in SWITCHES]
    if "optimizations" in kwargs and given:
        raise TypeError(
            f"{', '.join(given)} given twice: inside `optimizations` and as an argument of vLLM's; keep one"
        )
    for name in given:
        if (
            not name.endswith("parallel_size")
            and kwargs[name] is not None
            and type(kwargs[name]) is not bool
        ):
            raise ValueError(
                f"{name}={kwargs[name]!r} is not allowed; it must be True, False or None"
            )
    fields = {
        k: v
        for name in given
        if kwargs[name] is not None
        for k, v in SWITCHES[name](kwargs[name]).items()
    }
    return {
        **{k: v for k, v in kwargs.items() if k in own},
        "optimizations": dataclasses.replace(ALL, **fields),
    }
