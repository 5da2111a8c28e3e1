"""Which optimization runs on which machine. Loaded when one is asked for."""

from dataclasses import fields
from typing import Any

from nanovllm.config import LEVELS, Device, Optimizations

_BEST: dict[Device, dict[str, Any]] = {
    "cpu": {
        "attention_backend": "torch",
        "kernels": "torch",
        "batching": "chunked",
        "cuda_graphs": False,
        "overlap": False,
    },
    "cuda": {
        "attention_backend": "triton",
        "kernels": "triton",
        "batching": "chunked",
        "cuda_graphs": True,
        "overlap": True,
    },
}
_NEEDS_CUDA: dict[tuple[str, Any], str] = {
    ("attention_backend", "triton"): "Triton kernels run on a GPU",
    ("attention_backend", "flash_attn"): "FlashAttention runs on a GPU",
    ("kernels", "triton"): "Triton kernels run on a GPU",
    ("cascade_attention", True): "it is done by Triton kernels, which run on a GPU",
    ("cuda_graphs", True): "a CUDA graph is recorded on a GPU",
    ("all_reduce", "symmetric_memory"): "symmetric memory is that of GPUs",
}


def resolve(requested: Optimizations, device: Device, in_engine: bool) -> Optimizations:
    """Replaces every 'auto'. Raises ValueError for a level that cannot run on `device`, with what
    to use instead; in_engine: also for one that has no meaning in a single engine with the other
    levels as they are.
    """
    best: dict[str, Any] = {
        "prefix_cache": True,
        "all_reduce": "library",
        "cascade_attention": None,
        **_BEST[device],
    }
    asked = {f.name: getattr(requested, f.name) for f in fields(requested)}
    chosen = {name: best[name] if level == "auto" else level for name, level in asked.items()}
    can_share = (
        chosen["attention_backend"] == "triton" and chosen["prefix_cache"] and chosen["cuda_graphs"]
    )
    if requested.cascade_attention == "auto":
        chosen["cascade_attention"] = can_share
    for choice in chosen.items():
        name, level = choice
        if choice in _NEEDS_CUDA and device != "cuda":
            raise ValueError(
                f"{name}={level!r} cannot run on device {device!r}: {_NEEDS_CUDA[choice]}. "
                f"Use {name}={LEVELS[name][0]!r}, or a machine with an NVIDIA GPU."
            )
    if in_engine and requested.data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size={requested.data_parallel_size} is for LLM.generate, which shares requests out to "
            "replicas; an engine that is stepped is one of them: use data_parallel_size=1."
        )
    if in_engine and chosen["cascade_attention"] and not can_share:
        raise ValueError(
            "cascade_attention=True needs attention_backend='triton', which does it; prefix_cache=True, without which "
            "no two requests share a page; and cuda_graphs=True, as steps that share are recorded. "
            "Use cascade_attention=False."
        )
    if in_engine and chosen["all_reduce"] != "library" and requested.tensor_parallel_size == 1:
        raise ValueError(
            f"all_reduce={chosen['all_reduce']!r} needs tensor_parallel_size of 2 or more: one rank has nothing to "
            "sum. Use all_reduce='library'."
        )
    return Optimizations(**chosen)
