"""Ranks over gloo: the same tokens, several engines side by side, and a rank that dies or hangs is
an error, never a hang.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.config import Optimizations
from nanovllm.distributed import processes, rank, workers
from nanovllm.distributed.wire import Channel
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.models.checkpoint import ensure_checkpoint
from tests.support import forks

SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "block_size": 8,
    "kv_cache_memory_bytes": 1 << 20,
}
PROMPTS = [{"prompt_token_ids": [20 + i, 30, 40 + i]} for i in range(5)]
PARAMS = SamplingParams(temperature=0.8, max_tokens=10, ignore_eos=True, seed=3, logprobs=2)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


forked = pytest.mark.usefixtures("forked_processes")


def children() -> list[psutil.Process]:
    return [
        p
        for p in forks.children()
        if any(name in " ".join(p.cmdline()) for name in ("distributed.rank", forks.__name__))
    ]


@pytest.fixture(scope="module")
def four_heads() -> Path:
    """`tiny` with as many KV heads as four ranks need."""
    return ensure_checkpoint("tiny", num_key_value_heads=4)


def test_two_ranks_compute_the_same_and_two_engines_run_side_by_side(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as single:
        expected = tokens_of(single)
        blocks = single.resolved_config()["num_kv_blocks"]
        assert single.toggles()["tensor_parallel_size"]["engaged"] == 0
    toggles = {
        "tensor_parallel_size": 2,
        "batching": "chunked",
        "prefix_cache": True,
        "overlap": True,
    }
    with (
        LLM(str(tiny), **SMALL, optimizations=toggles) as one,
        LLM(str(tiny), **SMALL, optimizations=toggles) as other,
    ):
        assert len(children()) == 4
        assert tokens_of(one) == expected
        assert tokens_of(other) == expected
        assert one.toggles()["tensor_parallel_size"]["engaged"] > 0
        assert one.toggles()["all_reduce"]["engaged"] == 0
        # the same bytes a rank hold twice the tokens
        assert one.resolved_config()["num_kv_blocks"] == 2 * blocks
    assert children() == []


@forked
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.9, max_tokens=24, ignore_eos=True, seed=5),
        pytest.param(
            SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True), marks=pytest.mark.slow
        ),
        pytest.param(
            SamplingParams(
                temperature=1.0, top_k=50, top_p=0.9, max_tokens=24, ignore_eos=True, seed=6
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_four_ranks_with_preemptions_and_cached_prefixes(
    four_heads: Path, params: SamplingParams
) -> None:
    """Too few blocks for all, prompts that begin alike, and the counters of one process."""
    prompts = [{"prompt_token_ids": [*range(30, 46), 100 + i]} for i in range(6)]
    results = []
    for degree in (1, 4):
        # 9 blocks of 8 tokens
        arguments = SMALL | {"kv_cache_memory_bytes": 4 * 4 * 2 * 64 * 8 * 9 * 4 // degree}
        switches = {
            "tensor_parallel_size": degree,
            "batching": "chunked",
            "prefix_cache": True,
            "overlap": True,
        }
        with LLM(str(four_heads), **arguments, optimizations=switches) as llm:
            # it expects every request to end at once: memory runs out
            llm.scheduler.forecast.asked = 1 << 40
            outputs = llm.generate(prompts, params, use_tqdm=False)
            stats = llm.stats()
        assert stats["preemptions"] > 0
        assert stats["prefix_hit_tokens"] > 0
        results.append([output.outputs[0].token_ids for output in outputs])
    assert results[0] == results[1]
    assert children() == []


def main_of_a_rank_that_records(channel: Channel) -> None:
    """As with cuda_graphs on, as far as a CPU can: 'replay' computes again what would have been
    recorded.
    """
    from nanovllm.cpu import runner as on_a_cpu
    from tests.gpu.test_cuda_graph import FakeGraphRunner

    on_a_cpu.CpuRunner = FakeGraphRunner  # type: ignore[misc,assignment]
    rank.ModelRunner = FakeGraphRunner  # type: ignore[misc,attr-defined]
    rank.main(channel)


@forked
def test_ranks_replay_recorded_steps(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches between the buckets, rows that change owners, and steps whose plan is not sent in
    full.
    """
    params = [
        SamplingParams(temperature=0.8 * (i % 2), max_tokens=3 + 5 * i, ignore_eos=True, seed=i)
        for i in range(5)
    ]
    with LLM(str(tiny), **SMALL) as single:
        expected = [
            o.outputs[0].token_ids for o in single.generate(PROMPTS, params, use_tqdm=False)
        ]
    monkeypatch.setattr(
        workers, "RANK_MAIN", "tests.distributed.test_tensor_parallel.main_of_a_rank_that_records"
    )
    with LLM(str(tiny), **SMALL | {"max_num_seqs": 3}, tensor_parallel_size=2) as llm:
        assert [
            o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)
        ] == expected
        assert llm.stats()["graph_replays"] > 0
        assert llm.stats()["all_reduces.library"] == 2 * 4 * llm.stats()["steps"]


@forked
def test_a_killed_rank_ends_the_engine_with_an_error(tiny: Path) -> None:
    for victim in (0, 1):
        llm = LLM(str(tiny), **SMALL, tensor_parallel_size=2)
        os.kill(llm.runner._children[victim].process.pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(workers.WorkerError, match=rf"rank {victim} was killed \(SIGKILL\)"):
            tokens_of(llm)
        assert time.monotonic() - begin < 20
        assert children() == []
        with pytest.raises(RuntimeError, match="takes no requests"):
            tokens_of(llm)


@forked
@pytest.mark.parametrize("victim", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_hung_rank_ends_the_engine_with_an_error(
    four_heads: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    monkeypatch.setattr(workers, "COLLECTIVE_TIMEOUT_S", 2.0)
    llm = LLM(str(four_heads), **SMALL, tensor_parallel_size=4)
    os.kill(llm.runner._children[victim].process.pid, signal.SIGSTOP)
    with pytest.raises(
        workers.WorkerError, match=f"rank {victim} hangs: it did not answer within 2 s"
    ):
        tokens_of(llm)
    assert children() == []


def main_of_a_rank_that_never_finishes(channel: Channel) -> None:
    ModelRunner.collect = lambda *_: time.sleep(99)  # type: ignore[method-assign,assignment,return-value]
    rank.main(channel)


@forked
def test_a_step_that_nobody_finishes_ends_the_engine(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a graph whose all-reduce never ends: every rank has launched it, all of them live,
    and no tokens come.
    """
    monkeypatch.setattr(workers, "COLLECTIVE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(
        workers,
        "RANK_MAIN",
        "tests.distributed.test_tensor_parallel.main_of_a_rank_that_never_finishes",
    )
    llm = LLM(str(tiny), **SMALL, tensor_parallel_size=2)
    begin = time.monotonic()
    with pytest.raises(
        workers.WorkerError, match="ranks 0 to 1 hang: all have submitted the same step"
    ):
        tokens_of(llm)
    assert time.monotonic() - begin < 20
    assert children() == []


@pytest.mark.slow
def test_ranks_that_compile_do_not_hang(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COLLECTIVE_TIMEOUT_S", 1.0)  # a C++ compiler takes longer
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    with LLM(str(tiny), **SMALL) as single:
        expected = tokens_of(single)
    with LLM(
        str(tiny), **SMALL, optimizations={"tensor_parallel_size": 2, "kernels": "compile"}
    ) as llm:
        assert tokens_of(llm) == expected


def test_ranks_end_with_the_engine_however_it_ends() -> None:
    """kill -9 of the engine's process, while a rank waits for something else than its channel."""
    code = (
        "import os, signal; from nanovllm.distributed.processes import Child\n"
        f"child = Child('rank', '{forks.__name__}.wait_for_ever')\n"
        "print(child.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "a rank outlived its engine"
        time.sleep(0.05)


# of the socket and the process that nobody closed
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_process_that_is_dropped_unclosed_ends_and_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    child = processes.Child("rank", f"{forks.__name__}.wait_for_ever")
    process = psutil.Process(child.process.pid)
    del child
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    process.wait(20)


def test_symmetric_memory_is_refused_where_it_cannot_run(tiny: Path) -> None:
    with pytest.raises(
        ValueError, match="all_reduce='symmetric_memory' cannot run on device 'cpu'"
    ):
        LLM(
            str(tiny),
            **SMALL,
            optimizations={"tensor_parallel_size": 2, "all_reduce": "symmetric_memory"},
        )
    with pytest.raises(ValueError, match="needs tensor_parallel_size of 2 or more"):
        Optimizations(all_reduce="symmetric_memory").resolve("cuda", in_engine=True)


def test_a_rank_that_fails_at_start_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_TIMEOUT_S", 20.0)
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(workers.WorkerError, match="rank 0 ended"):
        LLM(str(tiny), **SMALL, tensor_parallel_size=2)


def test_a_degree_that_does_not_divide_the_heads(tiny: Path) -> None:
    with pytest.raises(
        ValueError, match="tensor_parallel_size=3 does not divide the model's 4 query heads"
    ):
        LLM(str(tiny), **SMALL, tensor_parallel_size=3)
    assert children() == []
