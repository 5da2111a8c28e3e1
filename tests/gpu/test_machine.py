"""What an engine asks of a machine, without one: a GPU that is too old, hidden or unusable; no
compiler; the caller's device.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.config import ALL, EngineConfig, Optimizations
from nanovllm.gpu import machine
from nanovllm.gpu.machine import (
    OnDevice,
    check_capability,
    describe,
    prepare,
    require_gpus,
    tell,
    triton_problem,
)

COMPILER_IS_MISSING = "Triton needs a C compiler and none was found"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An RTX 4070 beside an older card, as torch would show them."""
    fake = SimpleNamespace(capabilities=[(8, 9), (7, 5)], current=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(fake.capabilities))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: fake.capabilities[index])
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda index: ["NVIDIA GeForce RTX 4070", "Tesla T4"][index]
    )
    monkeypatch.setattr(machine, "triton_problem", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def config_with(**kwargs: Any) -> EngineConfig:
    return EngineConfig(model="m", **kwargs)


# -- compute capability and counts -----------------------------------------------------------------


def test_a_gpu_older_than_ampere_is_an_error_with_its_name(gpu: SimpleNamespace) -> None:
    assert prepare(config_with())[0] == "cuda"
    gpu.current = 1
    with pytest.raises(
        ValueError,
        match=r"GPU 1 \(Tesla T4\) has compute capability 7\.5; allowed is 8\.0 or newer.*device='cpu'",
    ):
        prepare(config_with())
    with pytest.raises(ValueError, match="compute capability 7"):
        prepare(config_with(device="cuda"))


@pytest.mark.parametrize(
    ("capability", "allowed"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)]
)
def test_allowed_capabilities(
    gpu: SimpleNamespace, capability: tuple[int, int], allowed: bool
) -> None:
    gpu.capabilities[0] = capability
    if allowed:
        check_capability(0)
    else:
        with pytest.raises(ValueError, match=r"is 8\.0 or newer"):
            check_capability(0)


def test_more_ranks_than_visible_gpus(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=4 needs 4 GPUs and 2 are visible: use at most 2"
    ):
        prepare(config_with(optimizations=Optimizations(tensor_parallel_size=4)))
    gpu.capabilities.pop()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(
        ValueError, match=r"needs 2 GPUs and 1 is visible \(CUDA_VISIBLE_DEVICES='3'\)"
    ):
        require_gpus(2, "data_parallel_size=2 with tensor_parallel_size=1")


def test_the_process_of_several_ranks_touches_no_gpu(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    monkeypatch.setattr(torch.cuda, "current_device", None)
    assert prepare(config_with(optimizations=Optimizations(tensor_parallel_size=2)))[0] == "cuda"


# -- a GPU that torch cannot use -------------------------------------------------------------------


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU behind a driver that is too old for this torch."""

    def is_available() -> bool:
        import warnings

        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "gpu_is_present", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("unusable")
def test_an_old_driver_is_said_once_with_torchs_reason(caplog: pytest.LogCaptureFixture) -> None:
    config = config_with()
    assert prepare(config) == ("cpu", config)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (
        "on the CPU although there is an NVIDIA GPU",
        "too old (found version 11040)",
        "CUDA 13.0",
        "update the NVIDIA driver",
    ):
        assert part in record.getMessage()
    with pytest.raises(
        ValueError,
        match=r"device='cuda' was asked for and torch sees no GPU: .*too old.*or use device='cpu'",
    ):
        prepare(config_with(device="cuda"))


@pytest.mark.usefixtures("unusable")
def test_a_torch_without_cuda_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert prepare(config_with())[0] == "cpu"
    assert "is built without CUDA; install the build for NVIDIA GPUs" in caplog.text


@pytest.mark.usefixtures("unusable")
@pytest.mark.parametrize("value", ["", "-1"])
def test_a_gpu_that_the_caller_hides_is_no_surprise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert prepare(config_with())[0] == "cpu"
    assert not caplog.records
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES='{value}' hides all; unset it"):
        prepare(config_with(device="cuda"))


@pytest.mark.usefixtures("unusable")
def test_a_machine_without_a_gpu_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "gpu_is_present", lambda: False)
    assert prepare(config_with())[0] == "cpu"
    assert not caplog.records


# -- no compiler, no headers -----------------------------------------------------------------------


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Triton's cache, empty; a driver library as on a GPU host."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_find_driver_library", lambda: None)
    monkeypatch.delenv("CC", raising=False)
    from triton.runtime import build

    if hasattr(build, "_find_compiler"):  # Triton 3.9 remembers what it found
        build._find_compiler.cache_clear()
        monkeypatch.setattr(build, "_find_compiler", build._find_compiler.__wrapped__)
    return tmp_path


def test_with_a_compiler_triton_has_all_it_needs_and_later_without(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert triton_problem() is None
    monkeypatch.setenv("PATH", str(no_cache))
    assert triton_problem() is None, "what was built lies in Triton's cache"


def test_without_a_compiler(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(no_cache))
    assert COMPILER_IS_MISSING in str(triton_problem())
    assert "apt-get install gcc" in str(triton_problem())
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC='no-such-compiler' is none" in str(triton_problem())


def test_without_pythons_headers(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sysconfig

    real = sysconfig.get_paths
    monkeypatch.setattr(
        sysconfig, "get_paths", lambda **kwargs: real(**kwargs) | {"include": str(no_cache)}
    )
    problem = str(triton_problem())
    assert f"{no_cache}/Python.h is missing" in problem
    assert f"apt-get install python3.{sys.version_info.minor}-dev" in problem


def test_without_the_drivers_library(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AssertionError("libcuda.so cannot found!")

    monkeypatch.setattr(machine, "_find_driver_library", missing)
    assert "TRITON_LIBCUDA_PATH" in str(triton_problem())


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert triton_problem() == "Triton is not installed; `pip install triton`"


def test_auto_takes_torchs_operations_and_says_what_is_lost(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "triton_problem", lambda: COMPILER_IS_MISSING)
    _, config = prepare(config_with())
    on = config.optimizations.resolve("cuda", in_engine=True)
    assert (on.kernels, on.attention_backend, on.cascade_attention, on.cuda_graphs) == (
        "torch",
        "torch",
        False,
        False,
    )
    assert (on.batching, on.overlap, on.prefix_cache) == ("chunked", True, True)
    (record,) = caplog.records
    for part in (
        "much slower",
        "kernels='torch'",
        "attention_backend='torch'",
        "cuda_graphs=False",
        COMPILER_IS_MISSING,
    ):
        assert part in record.getMessage()


@pytest.mark.parametrize(
    "levels",
    [
        {"kernels": "triton"},
        {"attention_backend": "triton"},
        {"kernels": "compile"},
        {"cascade_attention": True},
    ],
)
def test_an_explicit_level_that_needs_triton_is_an_error(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, levels: dict[str, Any]
) -> None:
    monkeypatch.setattr(machine, "triton_problem", lambda: COMPILER_IS_MISSING)
    ((name, level),) = levels.items()
    with pytest.raises(
        ValueError,
        match=f"{name}={level!r} cannot run here: {COMPILER_IS_MISSING}.*kernels='torch'",
    ):
        prepare(config_with(optimizations=Optimizations(**levels)))


def test_levels_that_need_no_triton_ask_for_no_compiler(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "triton_problem", None)
    for on in (Optimizations(), Optimizations(attention_backend="flash_attn", cuda_graphs="auto")):
        assert prepare(config_with(optimizations=on))[1].optimizations == on


# -- a started engine ------------------------------------------------------------------------------


def test_every_step_runs_on_the_engines_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller's is at the time: Triton launches on the current one."""
    current = [0]

    @contextmanager
    def on(device: torch.device) -> Any:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    loop = OnDevice(SimpleNamespace(step=lambda: current[0]), torch.device("cuda", 1))
    assert loop.step() == 1
    current[0] = 3
    assert loop.step() == 1
    assert current[0] == 3, "the caller's device is as it was"


def test_one_line_says_what_was_chosen(tiny: Path) -> None:
    levels = replace(ALL, kernels="torch", attention_backend="torch")
    resolved = config_with(dtype="bfloat16", max_num_seqs=8, optimizations=levels).resolve(
        device="cpu", dtype="bfloat16", max_position_embeddings=4096
    )
    line = describe(
        SimpleNamespace(**vars(resolved) | {"num_kv_blocks": 1000, "kv_cache_bytes": 3 << 29}),
        "NVIDIA H200 (cuda:1)",
    )
    assert line == (
        "NVIDIA H200 (cuda:1), bfloat16; attention torch, kernels torch, batching chunked, prefix cache (off: "
        "cascade attention, CUDA graphs, overlap); KV cache of 16,000 tokens, 1.50 GiB, for up to 8 requests of up to 4,096 "
        "tokens"
    )


def test_the_line_goes_where_the_application_wants_it() -> None:
    script = textwrap.dedent("""
        import logging, sys
        from nanovllm.gpu.machine import tell
        tell("first")
        logging.getLogger("nanovllm").setLevel(logging.WARNING)
        tell("second")
        logging.getLogger("nanovllm").setLevel(logging.NOTSET)
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        tell("third")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stderr == "nanovllm: first\n"
    assert done.stdout == "INFO:nanovllm:third\n"
    assert callable(tell)
    assert ALL.kernels == "auto"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_engine_stays_on_the_device_that_was_current(tiny: Path) -> None:
    """Also where the caller goes on to another one, with graphs and without."""
    from nanovllm import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    answers = []
    for device in (0, 1):
        for optimizations in (ALL, Optimizations(kernels="triton", attention_backend="triton")):
            torch.cuda.set_device(device)
            with LLM(
                str(tiny), max_model_len=256, max_num_seqs=4, optimizations=optimizations
            ) as llm:
                assert llm.runner.device.index == device
                torch.cuda.set_device(1 - device)
                answers.append(
                    llm.generate(["one two three"], params, use_tqdm=False)[0].outputs[0].token_ids
                )
                assert torch.cuda.current_device() == 1 - device
    torch.cuda.set_device(0)
    assert all(list(answer) == list(answers[0]) for answer in answers)
