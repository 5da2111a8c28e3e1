"""What is asked for, what is allowed, what it resolves to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanovllm import ALL, BASELINE, EngineConfig, Optimizations, SamplingParams
from nanovllm.config import LEVELS

RESOLVE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_position_embeddings": 4096}


def test_baseline_is_the_first_level_of_every_toggle() -> None:
    assert all(getattr(BASELINE, name) == levels[0] for name, levels in LEVELS.items())


def test_all_resolves_every_auto() -> None:
    resolved = ALL.resolve("cpu")
    levels = dict(vars(resolved))
    assert levels.pop("kv_cache_dtype") == "auto"  # the name of a level: the model's own dtype
    assert "auto" not in levels.values()
    assert resolved.prefix_cache is True
    assert resolved.batching != "static"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batching", "dynamic"),
        ("prefix_cache", "on"),
        ("prefix_cache", 1),
        ("kernels", "cuda"),
        ("attention_backend", "sdpa"),
        ("tensor_parallel_size", 0),
        ("tensor_parallel_size", True),
        ("overlap", None),
    ],
)
def test_unknown_levels_are_named_with_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        Optimizations(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_backend", "triton"),
        ("attention_backend", "flash_attn"),
        ("kernels", "triton"),
        ("cuda_graphs", True),
        ("cascade_attention", True),
    ],
)
def test_a_gpu_level_on_a_cpu_says_what_to_use_instead(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*cpu.*[Uu]se {name}="):
        Optimizations(**{name: value}).resolve("cpu")  # type: ignore[arg-type]


def test_cascade_attention_needs_what_it_reads_through() -> None:
    on: dict[str, Any] = {"attention_backend": "triton", "prefix_cache": True, "cuda_graphs": True}
    assert (
        Optimizations(**on, cascade_attention="auto")
        .resolve("cuda", in_engine=True)
        .cascade_attention
        is True
    )
    assert ALL.resolve("cuda").cascade_attention is True
    for lacking in (
        {"prefix_cache": False},
        {"attention_backend": "torch"},
        {"cuda_graphs": False},
    ):
        resolved = Optimizations(**{**on, **lacking}, cascade_attention="auto").resolve(
            "cuda", in_engine=True
        )
        assert resolved.cascade_attention is False
        with pytest.raises(
            ValueError, match=r"cascade_attention=True needs .*Use cascade_attention=False"
        ):
            Optimizations(**{**on, **lacking}, cascade_attention=True).resolve(
                "cuda", in_engine=True
            )
    config = EngineConfig.from_kwargs("m", disable_cascade_attn=True)
    assert config.optimizations.cascade_attention is False


def test_vllm_names_are_translated() -> None:
    config = EngineConfig.from_kwargs(
        "m",
        enable_prefix_caching=False,
        enforce_eager=True,
        enable_chunked_prefill=False,
        async_scheduling=False,
        tensor_parallel_size=2,
    )
    assert config.optimizations.prefix_cache is False
    assert config.optimizations.cuda_graphs is False
    assert config.optimizations.batching == "continuous"
    assert config.optimizations.overlap is False
    assert config.optimizations.tensor_parallel_size == 2


def test_unknown_arguments_are_errors() -> None:
    with pytest.raises(TypeError, match=r"unknown argument max_num_seq.*max_num_seqs"):
        EngineConfig.from_kwargs("m", max_num_seq=4)
    with pytest.raises(TypeError, match="twice"):
        EngineConfig.from_kwargs("m", optimizations=BASELINE, enforce_eager=True)
    with pytest.raises(TypeError):
        EngineConfig.from_kwargs("m", optimizations={"prefix_caching": True})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0),
        ("block_size", 1.5),
        ("max_num_seqs", 0),
        ("max_model_len", 0),
        ("kv_cache_memory_bytes", 0),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.1),
        ("dtype", "float64"),
        ("device", "tpu"),
        ("model", ""),
    ],
)
def test_values_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        EngineConfig(**{"model": "m", name: value})  # type: ignore[arg-type]


def test_float16_is_computed_by_torch_on_a_cpu() -> None:
    """The native kernels have float32 and bfloat16."""
    asked: dict[str, Any] = {**RESOLVE, "dtype": "float16"}
    on = EngineConfig(model="m", optimizations=ALL).resolve(**asked).optimizations
    assert (on.kernels, on.attention_backend, on.prefix_cache) == ("torch", "torch", True)
    native = EngineConfig(model="m", optimizations=Optimizations(kernels="native"))
    with pytest.raises(ValueError, match=r"kernels='native' .*not in float16. Use kernels='torch'"):
        native.resolve(**asked)


def test_a_checkpoint_of_another_dtype_says_what_to_choose() -> None:
    for dtype in ("auto", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=r"dtype='.*'float32', 'bfloat16' or 'float16' \(the"):
            EngineConfig(model="m").resolve(**{**RESOLVE, "dtype": dtype})


def test_contradictions_are_found_at_resolution() -> None:
    with pytest.raises(ValueError, match=r"max_model_len=8192.*4096"):
        EngineConfig(model="m", max_model_len=8192).resolve(**RESOLVE)
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=4 .*max_num_seqs, 8"):
        EngineConfig(model="m", max_num_seqs=8, max_num_batched_tokens=4).resolve(**RESOLVE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("max_tokens", 0),
        ("seed", 2**63),
        ("logprobs", -1),
        # Nothing that a later step would choke on, or that a float32 cannot hold.
        ("top_k", 2.5),
        ("top_k", 2**63),
        ("seed", 1.5),
        ("logprobs", 2.5),
        ("temperature", 1e-40),
        ("temperature", 1e39),
        ("top_p", 1e-50),
        ("temperature", None),
        ("top_k", "5"),
        ("max_tokens", 1.0),
    ],
)
def test_sampling_params_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_sampling_params_are_plain_numbers() -> None:
    """Numbers of numpy are taken: what is sent to ranks and written into records is Python's."""
    numbers: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(5),
        "top_p": np.float64(0.5),
    }
    given = SamplingParams(**numbers, max_tokens=np.int32(3), seed=np.uint64(7), logprobs=True)  # type: ignore[arg-type]
    assert given == SamplingParams(
        temperature=0.5, top_k=5, top_p=0.5, max_tokens=3, seed=7, logprobs=1
    )
    kinds = [
        type(getattr(given, name))
        for name in ("temperature", "top_k", "top_p", "max_tokens", "seed", "logprobs")
    ]
    assert kinds == [float, int, float, int, int, int]
    assert type(SamplingParams(temperature=np.float32(0)).temperature) is float  # type: ignore[arg-type]


def test_unknown_sampling_params_are_errors() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
