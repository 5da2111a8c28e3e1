"""The table of toggles: every optimization is a field of `Optimizations`, and its row is all that is known of it.

To add one, add its field here and write its module, its test and its study. What validates, resolves, counts,
prints or translates optimizations, and the studies' list of factors, reads this table.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

Device = Literal["cpu", "cuda"]


def toggle(*levels: Any, **row: Any) -> Any:
    """A field, its first level the baseline, and its row: what row.Toggle holds."""
    return field(default=levels[0], metadata={"levels": levels, **row})


@dataclass(frozen=True, kw_only=True)
class Optimizations:
    """One switch per optimization; the defaults are the baselines. 'auto' takes the best level of this machine.

    Raises ValueError for an unknown level, with what is allowed.
    """

    attention_backend: str = toggle(
        "torch",
        "triton",
        "flash_attn",
        "native",
        title="attention",
        best={"cpu": "native", "cuda": "triton"},
        gpu_only={
            "triton": "Triton kernels run on a GPU",
            "flash_attn": "FlashAttention runs on a GPU",
        },
        cpu_only={"native": "its kernels are C++ for CPUs"},
        by_triton=("triton",),
        by_compiler=("native",),
        needs=(
            lambda on: on["kv_cache_dtype"] == "auto" or on["attention_backend"] == "triton",
            "kv_cache_dtype='auto': other caches are read by attention_backend='torch' and 'triton' alone",
        ),
        engaged=lambda stats: sum(
            stats.attention_calls[level] for level in ("triton", "flash_attn", "native")
        ),
    )
    kernels: str = toggle(
        "torch",
        "compile",
        "triton",
        "native",
        title="kernels",
        best={"cpu": "native", "cuda": "triton"},
        gpu_only={"triton": "Triton kernels run on a GPU"},
        cpu_only={"native": "its kernels are C++ for CPUs"},
        by_triton=("triton", "compile"),
        by_compiler=("native",),
        engaged=lambda stats: sum(
            stats.kernel_calls[level] for level in ("compile", "triton", "native")
        ),
    )
    prefix_cache: bool | Literal["auto"] = toggle(
        False,
        True,
        title="prefix cache",
        best={"cpu": True, "cuda": True},
        vllm=("enable_prefix_caching", {}),
        engaged=lambda stats: stats.admissions if stats.prefix_lookup_tokens else 0,
        opportunity=lambda stats: stats.prefix_hit_tokens,
    )
    cascade_attention: bool | Literal["auto"] = toggle(
        False,
        True,
        title="cascade attention",
        best={"cuda": True},
        gpu_only={True: "it is computed by Triton kernels, which run on a GPU"},
        by_triton=(True,),
        needs=(
            lambda on: (
                on["attention_backend"] == "triton" and on["prefix_cache"] and on["cuda_graphs"]
            ),
            "attention_backend='triton', which computes it; prefix_cache=True, without which no two requests share a "
            "block; and cuda_graphs=True, as steps that share prefixes are captured",
        ),
        vllm=("disable_cascade_attn", {True: False, False: "auto"}),
        engaged=lambda stats: stats.attention_calls["cascade"],
        opportunity=lambda stats: stats.attention_calls["shared"],
    )
    batching: str = toggle(
        "static",
        "continuous",
        "chunked",
        title="batching",
        best={"cpu": "chunked", "cuda": "chunked"},
        vllm=("enable_chunked_prefill", {True: "chunked", False: "continuous"}),
        engaged=lambda stats: stats.policy_steps["continuous"] + stats.policy_steps["chunked"],
        opportunity=lambda stats: (
            stats.mixed_steps if stats.policy_steps["chunked"] else stats.refills
        ),
    )
    cuda_graphs: bool | Literal["auto"] = toggle(
        False,
        True,
        title="CUDA graphs",
        best={"cuda": True},
        gpu_only={True: "a CUDA graph is captured on a GPU"},
        vllm=("enforce_eager", {True: False, False: "auto"}),
        engaged=lambda stats: stats.graph_replays,
    )
    overlap: bool | Literal["auto"] = toggle(
        False,
        True,
        title="overlap",
        best={"cuda": True},
        vllm=("async_scheduling", {}),
        engaged=lambda stats: stats.overlapped_steps,
    )
    tensor_parallel_size: int = toggle(
        1,
        2,
        4,
        8,
        vllm=("tensor_parallel_size", {}),
        engaged=lambda stats: sum(stats.all_reduces.values()),
    )
    all_reduce: str = toggle(
        "library",
        "symmetric_memory",
        gpu_only={"symmetric_memory": "symmetric memory is that of GPUs"},
        needs=(
            lambda on: on["tensor_parallel_size"] > 1,
            "tensor_parallel_size of 2 or more: one rank has nothing to sum",
        ),
        engaged=lambda stats: stats.all_reduces["symmetric_memory"],
    )
    data_parallel_size: int = toggle(
        1,
        2,
        4,
        8,
        needs=(
            lambda on: False,
            "LLM.generate, which shares requests out to replicas: an engine that is stepped is one of them",
        ),
        vllm=("data_parallel_size", {}),
        engaged=lambda stats: 0,  # of one replica; distributed/data_parallel.py counts over all
    )
    quantization: str = toggle(
        "none",
        "int8",
        "int4",
        "fp8",
        title="quantization",
        lossy=True,
        vllm=("quantization", {}),
        engaged=lambda stats: sum(stats.kernel_calls[level] for level in ("int8", "int4", "fp8")),
    )
    kv_cache_dtype: str = toggle(
        "auto",
        "fp8_e4m3",
        title="KV values",
        lossy=True,
        vllm=("kv_cache_dtype", {"fp8": "fp8_e4m3"}),
        engaged=lambda stats: stats.attention_calls["fp8_e4m3"],
    )

    def __post_init__(self) -> None:
        asked = [f for f in fields(self) if getattr(self, f.name) is not f.default]
        if any(getattr(self, f.name) != "auto" or type(f.default) is int for f in asked):
            from nanovllm.toggles.availability import check

            check(self)

    def resolve(self, device: Device, in_engine: bool = False, dtype: str | None = None) -> Self:
        """Replaces every 'auto'. Raises ValueError for a level that cannot run on `device`, with what to use
        instead; in_engine: also for one that means nothing in a single engine beside the other levels; dtype: also
        for one that does not compute in it.
        """
        if self == BASELINE:
            return self
        from nanovllm.toggles.availability import resolve

        return type(self)(**resolve(self, device, in_engine, dtype))


# the levels of each optimization; the first is its baseline
LEVELS: dict[str, tuple[Any, ...]] = {f.name: f.metadata["levels"] for f in fields(Optimizations)}
BASELINE = Optimizations()  # every optimization off
# the best level of each on the machine at hand; parallel degrees stay 1
ALL = Optimizations(**{f.name: "auto" for f in fields(Optimizations) if type(f.default) is not int})  # type: ignore[arg-type]
