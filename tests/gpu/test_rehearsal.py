"""Compiling the kernels of a start side by side, without a GPU: a driver that only says what GPU it
is.

`python tests/gpu/test_rehearsal.py` is the part that needs kernels which the interpreter has not
replaced: it prints which kernels, specialized how, a rehearsal asks for, and which ones the same
steps ask for on tensors that have memory.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from nanovllm.config import ALL, EngineConfig
from nanovllm.kernels.registry import load_kernels
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import ModelConfig

MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    head_dim=64,
    dtype="bfloat16",
    tie_word_embeddings=True,
)


def test_a_rehearsal_asks_for_the_kernels_of_the_steps() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rehearsed, asked = json.loads(done.stdout)
    names = {name for name, _ in rehearsed}
    needed = {
        "decode_kernel",
        "prefill_kernel",
        "shared_kernel",
        "_gather_kernel",
        "_best_of_slice_kernel",
        "_write_blocks_kernel",
        "_few_rows_kernel",
    }  # the last only in two-byte types
    assert needed <= names
    assert rehearsed == asked


def test_a_rehearsal_that_fails_is_a_warning_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rehearsal = import_module("nanovllm.gpu.rehearsal")
    monkeypatch.setattr(rehearsal, "key_of", lambda runner, model: 1 / 0)
    started = rehearsal.Rehearsal(SimpleNamespace(device=torch.device("cuda", 0)), MODEL)
    started.wait()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "one after the other" in record.getMessage()
    assert "ZeroDivisionError" in record.getMessage()


def test_what_was_rehearsed_once_is_not_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rehearsal = import_module("nanovllm.gpu.rehearsal")
    compiled: list[Any] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        rehearsal, "compile_launches", lambda steps, device: compiled.append(device) or 43
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    config = EngineConfig(model="m", optimizations=ALL).resolve(
        device="cuda", dtype="bfloat16", max_position_embeddings=4096
    )
    runner = SimpleNamespace(device=torch.device("cuda", 0), config=config, tp=TensorParallel())
    counts = []
    for model in (MODEL, MODEL, ModelConfig(**vars(MODEL) | {"hidden_size": 1024})):
        started = rehearsal.Rehearsal(runner, model)
        started.wait()
        counts.append(started.num_kernels)
    assert counts == [43, 0, 43]
    assert len(compiled) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_engine_on_a_gpu_compiles_nothing_after_its_rehearsal(
    tiny: Path, tmp_path: Path
) -> None:
    script = """
import sys, threading, triton
from nanovllm import LLM, SamplingParams
late = []
def listen(*, src, metadata, metadata_group, times, cache_hit):
    if not cache_hit and threading.current_thread() is threading.main_thread():
        late.append(src.name)
triton.knobs.compilation.listener = listen
with LLM(sys.argv[1], dtype="bfloat16", max_model_len=1024, max_num_seqs=40) as llm:
    llm.generate(["one two three"], SamplingParams(max_tokens=8, temperature=0.5), use_tqdm=False)
    print(llm.runner.rehearsal.num_kernels, late)
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    for rehearsed in (True, False):  # from an empty cache, and once more
        done = subprocess.run(
            [sys.executable, "-c", script, str(tiny)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        count, _, late = done.stdout.strip().partition(" ")
        assert late == "[]", done.stdout
        assert (int(count) > 10) == rehearsed


# -- the process whose kernels are not interpreted -------------------------------------------------


def make_runner(device: torch.device) -> Any:
    """A GraphRunner that has got as far as its model."""
    from nanovllm.gpu.cuda_graph import GraphRunner, Variant, buckets_for

    config = EngineConfig(
        model="m",
        optimizations=ALL,
        max_model_len=1000,
        max_num_seqs=80,
        max_num_batched_tokens=1500,
    ).resolve(device="cuda", dtype="bfloat16", max_position_embeddings=4096)
    runner: Any = object.__new__(GraphRunner)
    runner.config, runner.tp, runner.device, runner.spare_row = (
        config,
        TensorParallel(),
        device,
        config.max_num_seqs,
    )
    runner.kernels = load_kernels(config.optimizations, Counter())
    runner.attention = Attention(
        config.optimizations,
        Counter(),
        num_kv_heads=2,
        block_size=16,
        head_dim=64,
        dtype=torch.bfloat16,
    )
    runner.ends = import_module("nanovllm.kernels.triton.decode_step")
    runner.variants = [
        Variant(bucket, False, shares)
        for bucket in reversed(buckets_for(80))
        for shares in (False, bucket > 32)
    ]
    return runner


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.gpu import rehearsal
    from nanovllm.kernels.triton import launch

    device, found = torch.device("cuda", 0), Counter[tuple[str, str]]()
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda index: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    launch._supports_pdl = lambda index: True
    launch._shared_memory = lambda device: 227 << 10

    def found_one(self: Any, key: str, *_: Any) -> Any:
        found[self.__name__, key] += 1
        self.device_caches[0][0][key] = kernel = object()
        return kernel

    JITFunction._do_compile = found_one
    runner = make_runner(device)
    rehearsal.compile_launches(
        lambda: rehearsal.first_steps(rehearsal.shadow_of(runner, MODEL)), device
    )
    rehearsed = sorted(found)
    assert set(found.values()) == {1}

    # The same steps, with memory: nothing is launched, so it holds zeros.
    for kernel in {
        value
        for module in list(sys.modules.values())
        if module.__name__.startswith("nanovllm.kernels.triton")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }:
        kernel.device_caches.clear()
    found.clear()
    rehearsal.META, torch.empty, torch.empty_like = (
        torch.device("cpu"),
        torch.zeros,
        torch.zeros_like,
    )
    model_of = import_module("nanovllm.models.qwen3").Qwen3ForCausalLM
    rehearsal.model_class = lambda name: lambda model, length, *rest: model_of(model, 2000, *rest)
    shadow = rehearsal.shadow_of(make_runner(device), MODEL)
    shadow._batch = lambda plan, rows: ModelRunner._batch(shadow, plan, rows)
    rehearsal.compile_launches(lambda: rehearsal.first_steps(shadow), device)
    print(json.dumps([rehearsed, sorted(found)]))


if __name__ == "__main__":
    main()
