"""Compiles the kernels of an engine's first steps in parallel while weights are loaded. Loaded on
a GPU with kernels='triton'.

Triton compiles a kernel when it is first launched, one after the other: half a minute on a machine
that has never run this engine. So the steps of a start, and a first prefill, run beforehand on the
meta device, where tensors have shapes and addresses but no memory:

    main thread   | the model is built, weights are read from disk ............ | wait | first steps: all kernels are ready
    rehearsal     | steps on meta tensors: which kernels | ... finished kernels |
    pool          |   kernel | kernel | kernel | ...                            |

A rehearsed step launches the same code with the same shapes, so Triton itself determines the
kernels it needs and stores them where a launch looks for them: in this process and in its cache on
disk. Whatever a rehearsal misses is compiled at its launch as usual. Most of the work is done by
LLVM and ptxas without Python's lock, so threads suffice. A rehearsed start leaves a mark in that
cache and is not rehearsed again, as its kernels are there.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from nanovllm.engine.kv_cache import KVCacheSpec
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.stats import StepStats
from nanovllm.gpu.prefill_graph import ShortPrefills
from nanovllm.gpu.step_memory import prefill
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.registry import load_kernels
from nanovllm.kernels.triton.launch import STANDS_FOR
from nanovllm.layers.attention import Attention
from nanovllm.models.config import ModelConfig
from nanovllm.models.families import model_class

LOG = logging.getLogger("nanovllm")
META = torch.device("meta")
_MARK = "rehearsed"
_ONE_AT_A_TIME = threading.Lock()


class Rehearsal:
    """Begins on construction; `wait` waits for its end. A failure only costs time, and is logged as
    a warning.
    """

    def __init__(self, runner: ModelRunner, model: ModelConfig) -> None:
        self.num_kernels, self.duration_s = 0, 0.0
        self._thread = threading.Thread(
            target=self._run, args=(copy.copy(runner), model), daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _run(self, runner: ModelRunner, model: ModelConfig) -> None:
        begin = time.perf_counter()
        try:
            mark = get_cache_manager(key_of(runner, model))
            if mark.get_file(_MARK) is None:
                torch.cuda.set_device(runner.device)  # each thread has its own current device
                self.num_kernels = compile_launches(
                    lambda: first_steps(shadow_of(runner, model)), runner.device
                )
                mark.put("", _MARK, binary=False)
        # whatever failed, a later launch compiles what is missing or reports the error
        except Exception as error:  # noqa: BLE001
            LOG.warning(
                "kernels will be compiled one after the other, as compiling them in parallel failed (%s: %s)",
                type(error).__name__,
                error,
            )
        self.duration_s = time.perf_counter() - begin


class _Pool(ThreadPoolExecutor):
    """Compiles kernels. With Triton before 3.9 a kernel's launcher is a C module of its own, which
    is built here as well.
    """

    num_kernels = 0

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        def build() -> Any:
            kernel = compile_kernel()
            driver.active.launcher_cls(kernel.src, kernel.metadata)  # into the cache on disk
            return kernel

        self.num_kernels += 1
        return super().submit(build)


def compile_launches(steps: Callable[[], None], device: torch.device) -> int:
    """Compiles in parallel what `steps`, which work on meta tensors, would launch on `device`.
    Returns the number of kernels.
    """
    # Not part of Triton's public interface (3.5 to 3.9 have it): without it the start is only slower.
    from triton.runtime._async_compile import AsyncCompileMode

    with _Pool(len(os.sched_getaffinity(0))) as pool:
        token = STANDS_FOR.set(device)
        try:
            with AsyncCompileMode(pool), launches_that_are_rehearsed_only_compile():
                steps()
        finally:
            STANDS_FOR.reset(token)
        return pool.num_kernels


def key_of(runner: ModelRunner, model: ModelConfig) -> str:
    """Hash of everything that decides which kernels a start launches, and what they contain."""
    kernels = sorted(
        Path(import_module("nanovllm.kernels.triton").__file__ or "").parent.rglob("*.py")
    )
    gpu = torch.cuda.get_device_properties(runner.device)
    config = dataclasses.replace(runner.config, model="_", tokenizer=None, seed=0)
    decides = (
        triton.__version__,
        gpu.name,
        gpu.major,
        gpu.minor,
        gpu.multi_processor_count,
        config,
        model,
        *(file.read_text(encoding="utf-8") for file in [*kernels, Path(__file__)]),
    )
    return hashlib.sha256(repr(decides).encode()).hexdigest()


@contextmanager
def launches_that_are_rehearsed_only_compile() -> Iterator[None]:
    """Kernels launched by this thread are only compiled, as STANDS_FOR says; those of other threads
    run.
    """
    with _ONE_AT_A_TIME:
        launch = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            return launch(
                self, *args, grid=grid, warmup=warmup or STANDS_FOR.get() is not None, **kwargs
            )

        JITFunction.run = run  # type: ignore[method-assign]
        try:
            yield
        finally:
            JITFunction.run = launch  # type: ignore[method-assign]


def shadow_of(runner: ModelRunner, model: ModelConfig) -> Any:
    """A runner of the same class and configuration on the meta device, with two layers, as all
    layers launch the same kernels.
    """
    shadow: Any = copy.copy(runner)
    dtype = getattr(torch, runner.config.dtype)
    shadow.device, shadow.stats, shadow.tp = META, StepStats(), copy.copy(runner.tp)
    # Other ranks take no part.
    shadow.tp.all_reduce = lambda x: x
    shadow.tp._gather = lambda x: x.new_empty(runner.tp.size, *x.shape)
    if runner.tp.size == 1:
        shadow.tp.all_gather = lambda x: x
    shadow.kernels = shadow.tp.over_shards(load_kernels(runner.config.optimizations, Counter()))
    if runner.config.optimizations.attention_backend != "triton":
        # another backend's kernels are not ours to compile
        shadow.attention = object.__new__(Attention)
        shadow.attention.prepare = lambda batch, **_: None
        shadow.attention.attend = lambda q, *_: torch.empty_like(q)
    model = dataclasses.replace(model, num_hidden_layers=min(2, model.num_hidden_layers))
    with META:
        shadow.model = model_class(model.architecture)(
            model, 1, shadow.kernels, shadow.attention, shadow.tp
        ).to(META)
    for parameter in shadow.model.parameters():
        # the default dtype belongs to the whole process and may differ at this moment
        parameter.data = parameter.data.to(dtype)
    shadow.model.requires_grad_(False)
    shadow.make_rows()
    shadow.kv_caches = KVCacheSpec.of(model, runner.config).allocate(1, META)
    shadow._batch = lambda plan, rows: batch_of(plan, runner.config.block_size)
    shadow._read_back = lambda *tensors: None
    return shadow


def batch_of(plan: StepPlan, block_size: int) -> ForwardBatch:
    """A batch with the shapes of ModelRunner._batch, without operations for which torch would load
    its compiler on the meta device.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    num_tokens, entries = plan.num_decodes + len(plan.token_ids), len(plan.rows)
    seq_lens = [start + length for start, length in zip(plan.starts, plan.query_lens, strict=True)]
    tables = empty(entries, -(-max(seq_lens) // block_size), dtype=torch.int32)
    return ForwardBatch(
        empty(num_tokens),
        empty(num_tokens),
        empty(num_tokens),
        tables,
        empty(entries, dtype=torch.int32),
        empty(entries + 1),
        plan.num_decodes,
        plan.query_lens,
        seq_lens,
    )


@torch.inference_mode()
def first_steps(shadow: Any) -> None:
    """The steps in which memory is measured, those that are captured, and a first short prefill."""
    config = shadow.config
    ModelRunner.submit(shadow, prefill(config, config.max_num_batched_tokens))
    if config.optimizations.cuda_graphs:
        ModelRunner.submit(shadow, prefill(config, config.max_num_seqs))
        if config.optimizations.attention_backend == "triton":
            shadow.model = _ShortPrefills(
                shadow.model,
                shadow.attention,
                shadow.stats,
                shadow.kv_caches,
                shadow.block_tables.shape[1],
                0,
                None,
                None,
            )  # type: ignore[arg-type]
        for variant in shadow.variants:
            shadow._decode(variant)
    else:
        for n in (1, config.max_num_seqs):
            ModelRunner.submit(
                shadow,
                StepPlan(-1, n, list(range(n)), [8] * n, [1] * n, [True] * n, greedy_only=False),
            )
    request = prefill(dataclasses.replace(config, max_num_seqs=1), 8)
    shadow.submit(
        dataclasses.replace(request, new_blocks=[(0, 0, 0)], new_rows=[(0, 1.0, 0, 1.0, 0, None)])
    )


class _ShortPrefills(ShortPrefills):
    """Runs the prefills that would be captured."""

    def _capture(self, bucket: int, kv_caches: Any, pool: Any, stream: Any) -> Any:
        hidden: Tensor = self._forward(bucket, kv_caches)
        return SimpleNamespace(replay=lambda stats: hidden)
