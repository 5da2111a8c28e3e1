"""What an engine may take of a GPU's memory, and what it says where something does not fit: with a
GPU of any size, made up.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.config import BASELINE, EngineConfig
from nanovllm.engine.kv_cache import KVCacheSpec
from nanovllm.gpu import memory_plan
from nanovllm.gpu.memory_plan import KEPT_FREE_BYTES, MemoryPlan, weights_bytes
from nanovllm.kernels.registry import load_kernels
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import ModelConfig

GIB = 1 << 30
QWEN3_8B = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=40_960,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    head_dim=128,
    dtype="bfloat16",
)
WEIGHTS = 16_381_470_720  # of Qwen3-8B in bfloat16, as its checkpoint's index says


class Gpu:
    """Memory as a driver shows it."""

    def __init__(
        self,
        total: float,
        others: float,
        listing: str = "pynvml module not found, please install nvidia-ml-py",
    ) -> None:
        self.total, self.free, self.listing = int(total * GIB), int((total - others) * GIB), listing
        self.step_bytes = 0

    def memory(self, device: torch.device) -> tuple[int, int]:
        return self.free, self.total


def plan_for(
    monkeypatch: pytest.MonkeyPatch,
    gpu: Gpu,
    *,
    model: ModelConfig = QWEN3_8B,
    ranks: int = 1,
    reserved: int = 0,
    **kwargs: Any,
) -> tuple[MemoryPlan, Any]:
    monkeypatch.setattr(memory_plan, "memory", gpu.memory)
    monkeypatch.setattr(memory_plan, "bytes_for_steps", lambda runner, spec: gpu.step_bytes)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda device: gpu.listing)
    config = EngineConfig(model="m", optimizations=BASELINE, **kwargs).resolve(
        device="cuda",
        dtype=kwargs.get("dtype", "bfloat16"),
        max_position_embeddings=model.max_position_embeddings,
    )
    tp = TensorParallel()
    tp.size = ranks
    calls: Any = {}
    attention = Attention(
        BASELINE,
        calls,
        num_kv_heads=model.num_key_value_heads // ranks,
        block_size=16,
        head_dim=model.head_dim,
        dtype=torch.bfloat16,
    )
    runner = SimpleNamespace(
        config=config,
        device=torch.device("cuda", 0),
        kernels=load_kernels(BASELINE, calls),
        attention=attention,
        tp=tp,
    )
    return MemoryPlan(runner, model), runner  # type: ignore[arg-type]


def blocks(plan: MemoryPlan, runner: Any, gpu: Gpu) -> int:
    """After loading."""
    gpu.free -= plan.weights_bytes
    return plan.num_blocks(runner, KVCacheSpec.of(QWEN3_8B, runner.config))


def test_the_weights_are_those_that_are_loaded(tiny: Path) -> None:
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        with LLM(
            str(tiny),
            device="cpu",
            dtype=dtype,
            max_model_len=64,
            max_num_seqs=2,
            optimizations=BASELINE,
        ) as llm:
            loaded = sum(p.numel() for p in llm.runner.model.parameters()) * itemsize
            assert weights_bytes(llm.runner, llm.model_config) == loaded


def test_weights_that_do_not_fit_say_what_is_missing_and_what_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing = "GPU:0\nprocess       4711 uses     1500.000 MB GPU memory\nprocess        12 uses      300.000 MB GPU memory"
    with pytest.raises(MemoryError) as caught:
        plan_for(monkeypatch, Gpu(16, 2, listing))
    said = str(caught.value)
    assert pytest.approx(15.26, abs=0.01) == WEIGHTS / GIB
    for part in (
        "the weights take 15.26 GiB in bfloat16",
        "of 16.00 GiB on cuda:0 14.00 GiB are free",
        "2.00 GiB are held by other processes",
        "process 4711 1500 MiB, process 12 300 MiB",
        "free 1.26 GiB or more",
        "tensor_parallel_size=2 on as many GPUs (7.63 GiB on each)",
        "a smaller model",
    ):
        assert part in said, said
    assert "bfloat16'" not in said, "it is that already"


def test_weights_in_float32_may_fit_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MemoryError, match=r"take 30\.51 GiB in float32.*dtype='bfloat16' \(15\.26 GiB\)"
    ):
        plan_for(monkeypatch, Gpu(24, 1), dtype="float32")


def test_a_share_that_is_too_small_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MemoryError,
        match=r"gpu_memory_utilization=0\.3 allows 7\.20 GiB.*raise .* to more than 0\.64",
    ):
        plan_for(monkeypatch, Gpu(24, 1), gpu_memory_utilization=0.3)


def test_another_engine_of_this_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MemoryError, match=r"9\.00 GiB by PyTorch in this process \(another engine\? close it\)"
    ):
        plan_for(monkeypatch, Gpu(24, 10), reserved=9 * GIB)


def test_on_an_empty_gpu_the_engine_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(80, 0)
    gpu.step_bytes = 2 * GIB
    plan, runner = plan_for(monkeypatch, gpu)
    num_blocks = blocks(plan, runner, gpu)
    block_bytes = 2 * 36 * 8 * 128 * 16 * 2
    assert num_blocks == (int(0.9 * gpu.total) - plan.weights_bytes - 2 * GIB) // block_bytes


def test_two_engines_of_half_a_gpu_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM: the share is of the whole memory, and each engine's own."""
    results = []
    for others in (0, 40):
        gpu = Gpu(80, others)
        results.append(blocks(*plan_for(monkeypatch, gpu, gpu_memory_utilization=0.45), gpu))
    assert results[0] == results[1]


def test_a_desktop_keeps_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where less is free than the share, all of it but half a GiB is taken."""
    gpu = Gpu(24, 4)
    plan, runner = plan_for(monkeypatch, gpu, max_model_len=8192)
    num_blocks = blocks(plan, runner, gpu)
    left = gpu.free - num_blocks * KVCacheSpec.of(QWEN3_8B, runner.config).block_bytes
    assert KEPT_FREE_BYTES <= left < KEPT_FREE_BYTES + (4 << 20)


def test_no_more_blocks_than_the_requests_can_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(80, 0)
    assert blocks(*plan_for(monkeypatch, gpu, max_model_len=1000, max_num_seqs=3), gpu) == 3 * 63


def test_a_cache_too_small_for_one_request_says_which_would_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(24, 0.5)
    gpu.step_bytes = 1 * GIB
    plan, runner = plan_for(monkeypatch, gpu, max_model_len=40_000)
    with pytest.raises(ValueError) as caught:
        blocks(plan, runner, gpu)
    said = str(caught.value)
    for part in (
        "one request of max_model_len=40000 takes 5.49 GiB",
        "the weights take 15.26 GiB",
        "a step 1.00 GiB",
    ):
        assert part in said, said
    (fits,) = map(int, re.findall(r"max_model_len=(\d+) or less", said))
    (share,) = map(
        float, re.findall(r"gpu_memory_utilization=([\d.]+) or more instead of 0.9", said)
    )
    gpu = Gpu(24, 0.5)
    gpu.step_bytes = 1 * GIB
    plan, runner = plan_for(monkeypatch, gpu, max_model_len=fits)
    assert blocks(plan, runner, gpu) * 16 >= fits, "what the error says helps"
    gpu = Gpu(24, 0.5)
    gpu.step_bytes = 1 * GIB
    plan, runner = plan_for(monkeypatch, gpu, gpu_memory_utilization=share, max_model_len=40_000)
    assert blocks(plan, runner, gpu) * 16 >= 40_000, "and so does this"


def test_the_models_own_limit_need_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who names no max_model_len wants an engine, not 40,960 tokens."""
    gpu = Gpu(24, 0.5)
    gpu.step_bytes = 1 * GIB
    plan, runner = plan_for(monkeypatch, gpu)
    tokens = blocks(plan, runner, gpu) * 16
    assert 30_000 < tokens < 40_960
    (record,) = caplog.records
    for part in (
        "longer requests will be refused",
        f"max_model_len={tokens} or less",
        "gpu_memory_utilization=",
    ):
        assert part in record.getMessage()
    gpu = Gpu(24, 0.5)
    gpu.step_bytes = 8 * GIB
    plan, runner = plan_for(monkeypatch, gpu)
    with pytest.raises(ValueError, match="the KV cache would hold 0 tokens"):
        blocks(plan, runner, gpu)


def test_a_share_that_would_not_help_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(24, 5)
    plan, runner = plan_for(monkeypatch, gpu, max_model_len=40_000)
    with pytest.raises(ValueError) as caught:
        blocks(plan, runner, gpu)
    assert "gpu_memory_utilization=" not in str(caught.value)
    assert "max_model_len=" in str(caught.value)


def test_an_explicit_cache_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (0.9, 0.1):
        gpu = Gpu(24, 0)
        plan, runner = plan_for(
            monkeypatch, gpu, kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=share
        )
        assert blocks(plan, runner, gpu) == (1 << 30) // (2 * 36 * 8 * 128 * 16 * 2)
