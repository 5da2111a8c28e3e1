"""The adapters of HTTP servers: our client's reading of a stream, what is sent, what is recorded, and
what happens when a server refuses, breaks off or ends.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import workloads
from experiments.engines import library, load_adapter, server_process, why_not_over_time
from experiments.engines.http_streams import EventReader, HttpServing, ServerError
from experiments.engines.nanovllm_server import Adapter as OurServer
from experiments.engines.vllm_server import Adapter as VllmServer
from experiments.launch import over_time
from experiments.launch.runner import Runner
from experiments.load import own_answers
from experiments.load.driving import drive
from nanovllm.config import LEVELS
from nanovllm.serving import AsyncLLM
from reports.page.evidence import reproduce_command
from tests.load.test_driving import Station
from tests.support.http_client import call, serving

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

SMALL: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "kv_cache_memory_bytes": 2**23,
}
WORK = workloads.build(
    "w",
    "random",
    {
        "num_requests": 6,
        "prompt_tokens": [3, 20],
        "output_tokens": [1, 8],
        "temperature": 0,
        "arrivals": {"process": "poisson", "rate": 40},
    },
)
REQUESTS = WORK["waves"][0]


def event(*tokens: int, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"token_ids": list(tokens), "finish_reason": reason}]}


def response(events: list[Any], chunked: bool) -> bytes:
    """A stream as servers write it: a chunk for each event."""
    parts = [b"data: " + json.dumps(each).encode() + b"\n\n" for each in events]
    parts.append(b"data: [DONE]\n\n")
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    if not chunked:
        return head + b"\r\n" + b"".join(parts)
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts])
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6),
    chunked=st.booleans(),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
)
def test_a_stream_has_the_same_events_however_it_arrives(
    tokens: list[list[int]], chunked: bool, cuts: list[int]
) -> None:
    events = [event(*each) for each in tokens]
    data = response(events, chunked)
    ends = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    reader, found = EventReader(), []
    for begin, end in itertools.pairwise(ends):
        found += list(reader.feed(data[begin:end]))
    assert found == events
    assert reader.status == 200


def test_an_error_in_a_stream_and_an_answer_that_is_no_stream() -> None:
    error = {"error": {"message": "it took too long"}}
    with pytest.raises(ServerError, match="it took too long"):
        list(EventReader().feed(response([event(1), error], True)))
    reader = EventReader()
    assert list(reader.feed(b"HTTP/1.1 429 Too Many\r\ncontent-length: 4\r\n\r\nfull")) == []
    assert (reader.status, reader.body) == (429, "full")


class Remote(Station):
    """A server in virtual time, which computes while the generator waits for the next due time."""

    def __init__(self, tokens: list[int], step_s: float) -> None:
        super().__init__(tokens, step_s)
        self.free = 0.0

    def advance_within(self, seconds: float | None) -> list[tuple[int, int, bool]]:
        end = max(self.now, self.free) + self.step_s
        if seconds is not None and self.now + seconds < end:
            self.now += max(seconds, 1e-9)
            return []
        self.free = self.now = end
        index = self.queue[0]
        self.done[index] += 1
        if self.done[index] == self.left[index]:
            self.queue.pop(0)
        return [(index, self.done[index], self.done[index] == self.left[index])]


def test_a_request_to_a_server_is_sent_when_it_is_due_not_after_a_step() -> None:
    station = Remote([3, 1], step_s=1.0)
    line = drive(
        station,
        {"rate": 1.0, "offset_s": [0.0, 0.25], "after": [None, None]},
        clock=station.clock,
        sleep=station.sleep,
    )
    assert line.sent_s[1] == pytest.approx(0.25)
    assert line.lateness_s[1] == pytest.approx(0.0, abs=1e-6)
    assert all(line.finished)


def test_a_client_that_is_late_is_late_by_its_own_fault() -> None:
    """What takes the client long while it reads tokens is no step of the engine."""
    station = Remote([4, 1], step_s=0.01)
    slow = station.advance_within

    def reads_slowly(seconds: float | None) -> list[tuple[int, int, bool]]:
        found = slow(seconds)
        station.now += 0.5 if found else 0.0
        return found

    station.advance_within = reads_slowly  # type: ignore[method-assign]
    line = drive(
        station,
        {"rate": 1.0, "offset_s": [0.0, 0.1], "after": [None, None]},
        clock=station.clock,
        sleep=station.sleep,
    )
    assert line.lateness_s[1] is not None
    assert line.lateness_s[1] > 0.3


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(tiny), **SMALL, max_queue=8)
    yield llm
    asyncio.run(llm.shutdown())


@pytest.fixture(scope="module")
def port(llm: AsyncLLM) -> Iterator[int]:
    with serving(llm, dev_endpoints=True) as port:
        yield port


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    """What the engine answers in this process."""
    return in_process(tiny, REQUESTS)


def in_process(tiny: Path, requests: list[Any]) -> list[list[int]]:
    adapter: Any = load_adapter("nanovllm")(str(tiny), {**SMALL, "seed": 0})
    adapter.load()
    outputs: list[list[int]] = adapter.serve(requests)["outputs"]
    adapter.close()
    return outputs


class Reached:
    """A ServerAdapter's server that runs already."""

    def __init__(self, port: int) -> None:
        self.address = ("127.0.0.1", port)

    def call(self, method: str, path: str) -> tuple[int, str]:
        answer = call(self.address[1], path, None, method)
        return answer.status, answer.raw.decode()


def adapter_of(port: int) -> Any:
    adapter = OurServer("tiny", {})
    adapter._server = Reached(port)
    bodies = adapter.body

    def named(request: Any) -> dict[str, Any]:
        return {**bodies(request), "model": "tiny"}

    adapter.body = named  # type: ignore[method-assign]
    return adapter


def test_over_http_the_tokens_are_the_same(port: int, expected: list[list[int]]) -> None:
    adapter = adapter_of(port)
    assert adapter.serve(REQUESTS)["outputs"] == expected
    adapter.reset()
    answer = over_time.answer(adapter, REQUESTS, WORK["arrivals"], None)
    assert answer["outputs"] == expected
    assert set(answer["finish_reasons"]) == {"length"}
    for (due, first, last), planned in zip(
        answer["request_times_s"], WORK["arrivals"]["offset_s"], strict=True
    ):
        assert due == planned
        assert due <= first <= last <= answer["duration_s"]
    assert answer["load"]["never_sent"] == 0


def test_a_conversation_over_http_goes_on_with_its_own_answers(port: int, tiny: Path) -> None:
    work = workloads.build(
        "talk",
        "conversation",
        {
            "num_conversations": 2,
            "turns": 3,
            "system_tokens": 4,
            "user_tokens": 4,
            "answer_tokens": 5,
            "temperature": 0,
            "arrivals": {"process": "constant", "rate": 20, "answers": "own"},
        },
    )
    requests = [request for wave in work["waves"] for request in wave]
    answer = over_time.answer(adapter_of(port), requests, work["arrivals"], None)
    served = own_answers.as_served(requests, work["arrivals"]["after"], answer["outputs"])
    assert in_process(tiny, served) == answer["outputs"]


def test_given_up_requests_are_ended_by_the_server(port: int, llm: AsyncLLM) -> None:
    answer = over_time.answer(adapter_of(port), REQUESTS, WORK["arrivals"], lambda *_: True)
    assert answer["load"]["never_sent"] > 0 or "abort" in answer["finish_reasons"]
    for _ in range(1000):
        if llm.num_unfinished == 0:
            break
        threading.Event().wait(0.01)
    assert llm.num_unfinished == 0


def test_token_ids_come_on_request(port: int) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    plain = call(port, "/v1/completions", body).json["choices"][0]
    assert "token_ids" not in plain
    with_ids = {**body, "return_token_ids": True}
    whole = call(port, "/v1/completions", with_ids).json["choices"][0]
    assert (len(whole["token_ids"]), whole["prompt_token_ids"]) == (4, [5, 6, 7])
    assert whole["text"] == plain["text"]
    choices = [
        each["choices"][0]
        for each in call(port, "/v1/completions", {**with_ids, "stream": True}).events
    ]
    assert [t for choice in choices for t in choice["token_ids"]] == whole["token_ids"]
    assert [choice["prompt_token_ids"] for choice in choices] == [
        [5, 6, 7],
        *[None] * (len(choices) - 1),
    ]


def test_what_experiments_need_is_there_only_on_request(port: int, llm: AsyncLLM) -> None:
    found = call(port, "/engine").json
    assert found["resolved"]["max_num_seqs"] == 4
    assert found["counters"]["admissions"] >= 0
    assert set(found["toggles"]) <= set(LEVELS)
    assert call(port, "/reset_prefix_cache", method="POST").status == 200
    with serving(llm) as plain:
        assert call(plain, "/engine").status == 404
        assert call(plain, "/reset_prefix_cache", method="POST").status == 404


@contextmanager
def answering(data: bytes) -> Iterator[int]:
    """A server that answers every connection with these bytes and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.recv(1 << 16)
                connection.sendall(data)
                connection.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (response([event(1), event(2)], True), "closed the connection of request 0 after 2 tokens"),
        (b"HTTP/1.1 400 Bad\r\n\r\n{no}", "answered 400: {no}"),
        (response([{"choices": [{"text": "a", "finish_reason": None}]}], True), "no token ids"),
        (b"", "answered None"),
    ],
)
def test_a_server_that_does_not_do_its_work_ends_the_launch(data: bytes, message: str) -> None:
    with answering(data) as port:
        client = HttpServing(("127.0.0.1", port), [{"prompt": [1]}])
        with pytest.raises(ServerError, match=message):
            drive(client, {"rate": None, "offset_s": [0.0], "after": [None]})
        client.served()


def test_a_server_that_ends_at_once_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = OurServer("tiny", SMALL)
    monkeypatch.setattr(adapter, "command", lambda: [sys.executable, "-c", "exit(3)"])
    with pytest.raises(ServerError, match="ended with status 3"):
        adapter.load()


def test_our_server_as_a_process(tiny: Path, expected: list[list[int]]) -> None:
    levels = {name: values[0] for name, values in LEVELS.items()}
    levels |= {"prefix_cache": True, "batching": "chunked"}
    adapter = OurServer(str(tiny), {**SMALL, "seed": 7, "optimizations": levels})
    resolved = adapter.load()
    try:
        assert (resolved["seed"], resolved["max_num_seqs"]) == (7, 4)
        assert resolved["optimizations"]["prefix_cache"] is True
        before = adapter.counters()
        assert over_time.answer(adapter, REQUESTS, WORK["arrivals"], None)["outputs"] == expected
        after = adapter.counters()
        assert after["admissions"] - before["admissions"] == len(REQUESTS)
        assert adapter.toggles()["prefix_cache"]["level"] is True
        adapter.reset()
    finally:
        adapter.close()
    assert adapter._server._process.returncode == 0  # it drained


def test_vllms_server_is_started_with_what_the_study_sets() -> None:
    config = {"device": "cpu", **{k: v for k, v in SMALL.items() if k in VllmServer.allowed}}
    adapter = VllmServer("folder", {**config, "seed": 3, "enable_prefix_caching": False})
    command = adapter.command()
    assert command[3:5] == ["serve", "folder"]
    text = " ".join(command)
    for option in (
        "--host 127.0.0.1",
        "--dtype float32",
        "--seed 3",
        "--max-num-seqs 4",
        "--kv-cache-memory-bytes 8388608",
        "--no-enable-prefix-caching",
        "--generation-config vllm",
    ):
        assert option in text
    assert "seed" not in adapter.body(REQUESTS[0])
    with pytest.raises(ValueError, match="unknown config key block_size"):
        VllmServer("folder", {"block_size": 4})


def test_what_vllms_server_tells_is_recorded(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "hidden_size": 64}))
    metrics = (
        "# HELP vllm:cache_config_info\n"
        'vllm:cache_config_info{block_size="128",cache_dtype="auto",enable_prefix_caching="True",num_gpu_blocks="37"} 1.0\n'
        'vllm:num_preemptions_total{engine="0",model_name="model"} 2.0\n'
        'vllm:prefix_cache_queries_total{engine="0",model_name="model"} 480.0\n'
        'vllm:prefix_cache_hits_total{engine="0",model_name="model"} 1.28e+02\n'
    )

    class Told:
        def call(self, method: str, path: str) -> tuple[int, str]:
            return 200, {"/version": '{"version": "0.32.0"}', "/metrics": metrics}[path]

    adapter = VllmServer(str(tmp_path), {"dtype": "float32"})
    adapter._server = Told()
    assert adapter._resolved() == {
        "dtype": "float32",
        "version": "0.32.0",
        "interface": "vllm serve",
        "block_size": 128,
        "num_kv_blocks": 37,
        "kv_cache_bytes": 128 * 37 * 2 * 2 * 2 * 16 * 4,
        "levels": {"prefix_cache": "on"},
    }
    assert adapter.counters() == {
        "preemptions": 2,
        "prefix_lookup_tokens": 480,
        "prefix_hit_tokens": 128,
    }
    assert server_process.read_labels(metrics, "vllm:nothing") == {}


def test_vllms_cache_is_really_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(200, '{"success": false}'), (200, '{"success": true}'), (404, "no")]

    class Told:
        def call(self, method: str, path: str) -> tuple[int, str]:
            assert (method, path) == ("POST", "/reset_prefix_cache")
            return answers.pop(0) if len(answers) > 1 else answers[0]

    adapter = VllmServer("folder", {})
    adapter._server = Told()
    adapter.reset()
    assert len(answers) == 1
    with pytest.raises(ServerError, match="did not reset its prefix cache"):
        adapter.reset()
    answers[:] = [(200, '{"success": false}')]
    monkeypatch.setattr("experiments.engines.vllm_server.RESET_S", 0.05)
    with pytest.raises(ServerError, match="false"):
        adapter.reset()
    answers[:] = [(200, "")]
    adapter.reset()


def test_servers_take_requests_over_time_and_the_interpreter_of_their_library() -> None:
    for engine in ("nanovllm_server", "vllm_server"):
        assert why_not_over_time(engine) is None
    assert library("vllm_server") == "vllm"
    assert library("hf") == "hf"
    given: Any = SimpleNamespace(pythons={"vllm": "/their/python"})
    assert Runner._python(given, "vllm_server") == Runner._python(given, "vllm") == "/their/python"
    assert Runner._python(given, "nanovllm_server") == sys.executable
    given.pythons["vllm_server"] = "/another"
    assert Runner._python(given, "vllm_server") == "/another"


def test_the_command_that_repeats_a_comparison_of_servers_is_its_own() -> None:
    plan: Any = {
        "study": {"name": "compare-vllm-online"},
        "model": {"preset": "tiny"},
        "profile": {"name": "cpu"},
        "cells": {"baseline": {"engine": "nanovllm_server"}, "vllm": {"engine": "vllm_server"}},
    }
    words = "STUDY=compare-vllm-online PROFILE=cpu MODEL=tiny"
    assert reproduce_command(plan) == f"make compare-vllm-online {words}"
    plan["study"]["overrides"] = {"question": "two words"}
    assert "compare --with vllm-online --study" in reproduce_command(plan)
