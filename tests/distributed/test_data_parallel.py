"""Replicas: the tokens of one engine, the order of the prompts, and a replica that dies or stops is
an error that names it.
"""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm import LLM, EngineConfig, LLMEngine, SamplingParams
from nanovllm.config import Optimizations
from nanovllm.distributed import data_parallel
from nanovllm.distributed.data_parallel import expected_work, share_out
from nanovllm.distributed.processes import WorkerError
from nanovllm.distributed.wire import Channel
from tests.support.forks import children

SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "block_size": 8,
    "kv_cache_memory_bytes": 1 << 20,
}
PROMPTS = [
    "one two three",
    *({"prompt_token_ids": [20 + i, *[30] * (i % 4), 40 + i]} for i in range(8)),
]
PARAMS = [
    SamplingParams(temperature=0.8, max_tokens=4 + 5 * (i % 3), ignore_eos=True, logprobs=1)
    for i in range(9)
]


forked = pytest.mark.usefixtures("forked_processes")


def test_two_replicas_give_the_outputs_of_one_engine(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as single:
        expected = single.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert single.toggles()["data_parallel_size"] == {
            "level": 1,
            "baseline": 1,
            "engaged": 0,
            "opportunity": None,
        }
    with LLM(str(tiny), **SMALL, data_parallel_size=2) as llm:
        assert len(children()) == 2
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [
            o.outputs[0].token_ids for o in expected
        ]
        assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in expected]
        assert [o.request_id for o in outputs] == [o.request_id for o in expected]
        assert all(o.metrics.arrival_time < o.metrics.finished_time for o in outputs)
        toggle = llm.toggles()["data_parallel_size"]
        assert 0 < toggle["engaged"] < len(PROMPTS)
        assert toggle["level"] == llm.resolved_config()["optimizations"]["data_parallel_size"] == 2
        assert llm.stats()["decode_tokens"] == sum(p.max_tokens - 1 for p in PARAMS)
        with pytest.raises(ValueError, match="empty prompt"):
            llm.generate([[1, 2], []], PARAMS[:2], use_tqdm=False)
        assert llm.stats()["decode_tokens"] == sum(p.max_tokens - 1 for p in PARAMS), (
            "one was not valid, and another ran"
        )
        llm.reset_stats()
        assert not any(llm.stats().values())
        # alive, and fewer requests than replicas
        again = llm.generate(PROMPTS[:1], PARAMS[:1], use_tqdm=False)
        assert again[0].finished
    assert children() == []
    with pytest.raises(RuntimeError, match="takes no requests"):
        llm.generate(PROMPTS, PARAMS)


@forked
@pytest.mark.slow
def test_replicas_of_several_ranks(tiny: Path) -> None:
    switches = {
        "data_parallel_size": 2,
        "tensor_parallel_size": 2,
        "batching": "chunked",
        "overlap": True,
    }
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(str(tiny), **SMALL) as single:
        expected = [
            o.outputs[0].token_ids for o in single.generate(PROMPTS, params, use_tqdm=False)
        ]
    with LLM(str(tiny), **SMALL, optimizations=switches) as llm:
        assert len(children()) == 6
        assert [
            o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)
        ] == expected
        assert llm.toggles()["tensor_parallel_size"]["engaged"] > 0
    assert children() == []


@forked
@pytest.mark.parametrize(
    ("kind", "await_its_end", "message", "call"),
    [
        (signal.SIGKILL, False, r"replica 1 was killed \(SIGKILL\)", "generate"),
        (signal.SIGKILL, True, r"replica 1 was killed \(SIGKILL\)", "generate"),
        (signal.SIGKILL, True, r"replica 1 was killed \(SIGKILL\)", "reset_stats"),
        (signal.SIGSTOP, False, "replica 1 hangs", "reset_prefix_cache"),
    ],
)
def test_a_replica_that_dies_or_stops_ends_the_engine(
    tiny: Path, kind: signal.Signals, await_its_end: bool, message: str, call: str
) -> None:
    llm = LLM(str(tiny), **SMALL, data_parallel_size=2)
    process = children()[1]
    os.kill(process.pid, kind)
    while await_its_end and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(WorkerError, match=message):
        llm.generate(PROMPTS, PARAMS) if call == "generate" else getattr(llm, call)()
    assert children() == []
    with pytest.raises(RuntimeError, match="takes no requests"):
        llm.generate(PROMPTS, PARAMS)


@forked
def test_a_refused_call_is_refused_as_by_one_engine_and_leaves_no_trace(tiny: Path) -> None:
    """Not valid, or larger than the whole KV cache: 4 blocks of 8 tokens."""
    settings, params = (
        SMALL | {"kv_cache_memory_bytes": 1 << 17},
        SamplingParams(temperature=0.8, max_tokens=12),
    )
    refused = [
        ([[1, 2], [], [3]], "request '1' has an empty prompt"),
        ([[1], [5] * 30], "request '1' needs 6 KV blocks for 42 tokens, the cache has 4"),
        ([[5] * 30, [5] * 40], "request '0' needs 6 KV blocks"),
        ([[5] * 30, [1], [2], []], "request '3' has an empty prompt"),
        ([[1], [2], [3, -1], []], "request '2' holds token id -1"),
        ([[1, 2], {"prompt": 5}], "a prompt is a int"),
    ]
    with LLM(str(tiny), **settings) as untroubled:
        expected = untroubled.generate(PROMPTS[1:5], params, use_tqdm=False)
    for size in (1, 2):
        with LLM(str(tiny), **settings, data_parallel_size=size) as llm:
            assert llm.resolved_config()["num_kv_blocks"] == 4
            for prompts, message in refused:
                with pytest.raises((ValueError, TypeError), match=message):
                    llm.generate(prompts, params, use_tqdm=False)
            assert llm.toggles()["data_parallel_size"]["engaged"] == 0
            outputs = llm.generate(PROMPTS[1:5], params, use_tqdm=False)
            assert [o.request_id for o in outputs] == [o.request_id for o in expected]
            assert [o.outputs[0].token_ids for o in outputs] == [
                o.outputs[0].token_ids for o in expected
            ]


def test_a_replica_answers_with_the_error_of_a_call_that_left_it_sound(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LLM, seq: object) -> None:
        raise ValueError("no output can be made of it")

    ours, theirs = map(Channel, socket.socketpair())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        replica = pool.submit(data_parallel.main, theirs)
        ours.send(pickle.dumps((EngineConfig.from_kwargs(str(tiny), **SMALL), 1, 0)))
        assert ours.receive(60).startswith(b"ready")

        def ask(*command: object) -> Any:
            ours.send(pickle.dumps(command))
            while (answer := ours.receive(60)).startswith(b"working"):
                pass
            return pickle.loads(answer[answer.index(b"\x80") :])

        assert ask("check", [(7, [1, 2], SamplingParams(max_tokens=2))]) is None
        with monkeypatch.context() as patch:
            patch.setattr(LLMEngine, "output_of", fail)
            assert isinstance(ask("run"), ValueError)
        assert len(ask("run")) == 1
        ours.close()
        with pytest.raises(EOFError):
            replica.result(60)
    theirs.close()


@forked
def test_what_cannot_be_sent_to_a_replica_leaves_no_answer_behind(tiny: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    with LLM(str(tiny), **SMALL, data_parallel_size=2) as llm:
        expected = [
            o.outputs[0].token_ids for o in llm.generate(PROMPTS[1:], params, use_tqdm=False)
        ]
        with pytest.raises(TypeError, match="generator"):
            llm.generate([[], (token for token in [1, 2])], params, use_tqdm=False)
        assert [
            o.outputs[0].token_ids for o in llm.generate(PROMPTS[1:], params, use_tqdm=False)
        ] == expected


def test_an_engine_that_steps_has_no_replicas(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"LLM\.generate"):
        LLMEngine(
            EngineConfig(
                model=str(tiny), optimizations=Optimizations(data_parallel_size=2), device="cpu"
            )
        )


def test_work_is_shared_out_evenly() -> None:
    work = [expected_work(100 + 37 * i % 900, 100 + 61 * i % 900) for i in range(256)]
    for parts in (2, 4, 8):
        shares = share_out(work, parts)
        assert sorted(i for share in shares for i in share) == list(range(256))
        loads = [sum(work[i] for i in share) for share in shares]
        assert max(loads) < 1.02 * min(loads)
    assert share_out([5.0], 3) == [[0], [], []]
