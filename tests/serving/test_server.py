"""The HTTP server over loopback: OpenAI's API, and clients that mean no good."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.serving import AsyncLLM, async_llm
from tests.serving.test_async_llm import PROMPT, SMALL, nothing_left
from tests.support.http_client import begin, call, serving

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"prompt": PROMPT, "max_tokens": 100, **GREEDY}
HELLO = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(tiny), max_queue=8, **SMALL)
    yield llm
    asyncio.run(llm.shutdown())


@pytest.fixture(scope="module")
def port(llm: AsyncLLM) -> Iterator[int]:
    with serving(llm, chat_template=TEMPLATE, max_body_bytes=1 << 20) as port:
        yield port


@pytest.fixture(scope="module")
def offline(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), **SMALL) as llm:
        yield llm


def all_is_well(port: int, llm: AsyncLLM) -> None:
    """The server answers, and all KV blocks come back. A server hears of a client's end a moment
    after the client.
    """
    for _ in range(1000):
        if llm.num_unfinished == 0:
            break
        time.sleep(0.02)
    asyncio.run(nothing_left(llm))
    assert call(port, "/health").status == 200
    answer = call(port, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3, **GREEDY})
    assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, 3)


def test_models_and_health(port: int, llm: AsyncLLM) -> None:
    listed = call(port, "/v1/models").json["data"]
    assert [model["id"] for model in listed] == ["tiny", "other"]
    assert listed[0]["max_model_len"] == 128
    all_is_well(port, llm)


def test_a_completion_is_that_of_llm(port: int, offline: LLM) -> None:
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=12, n=2, logprobs=2, stop=["zz"])
    (whole,) = offline.generate(PROMPT, params, use_tqdm=False)
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "temperature": 0.7,
        "seed": 3,
        "max_tokens": 12,
        "n": 2,
        "logprobs": 2,
        "stop": "zz",
        "user": "somebody",
        "best_of": 2,
        "suffix": None,
    }
    answer = call(port, COMPLETIONS, body)
    assert answer.status == 200
    found = answer.json
    assert answer.headers["x-request-id"] == found["id"]
    assert (found["object"], found["model"]) == ("text_completion", "tiny")
    for choice, completion in zip(found["choices"], whole.outputs, strict=True):
        assert choice["index"] == completion.index
        assert choice["text"] == completion.text
        assert choice["finish_reason"] == completion.finish_reason
        logprobs = choice["logprobs"]
        assert completion.logprobs is not None
        chosen = [
            entry[t].logprob
            for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        assert logprobs["token_logprobs"] == pytest.approx(chosen)
        assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == len(chosen)
        assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    used = found["usage"]
    assert used["prompt_tokens"] == len(whole.prompt_token_ids)
    assert used["completion_tokens"] == sum(len(c.token_ids) for c in whole.outputs)
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_in_one_request(port: int, offline: LLM, stream: bool) -> None:
    prompts = [[5, 6, 7], [9, 10], [11]]
    wholes = offline.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(max_tokens=9, n=2, seed=1),
        use_tqdm=False,
    )
    body = {"prompt": prompts, "max_tokens": 9, "n": 2, "seed": 1, "temperature": 1, "top_p": 1}
    answer = call(port, COMPLETIONS, {**body, "stream": stream})
    expected = [completion.text for whole in wholes for completion in whole.outputs]
    if not stream:
        assert [choice["text"] for choice in answer.json["choices"]] == expected
        return
    texts = [""] * 6
    for event in answer.events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_a_stream_is_the_whole_answer_in_parts(port: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "logprobs": 1, **GREEDY}
    whole = call(port, COMPLETIONS, body).json
    answer = call(
        port, COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = answer.events
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    told = whole["choices"][0]["logprobs"]
    for name in told:
        assert [x for choice in choices for x in choice["logprobs"][name]] == told[name]
    assert not [chunk for chunk in chunks if "usage" in chunk]


def test_usage_in_every_chunk(port: int) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 5, **GREEDY, "stream": True, "stream_options": options}
    counts = [event["usage"]["completion_tokens"] for event in call(port, COMPLETIONS, body).events]
    assert counts[-1] == 5
    assert counts == sorted(counts)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chat_is_that_of_llm(port: int, offline: LLM, limit: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    (whole,) = offline.chat(HELLO, params, use_tqdm=False, chat_template=TEMPLATE)
    body = {"model": "other", "messages": HELLO, limit: 10, **GREEDY}
    found = call(port, CHAT, body | {"logprobs": True, "top_logprobs": 2}).json
    (choice,) = found["choices"]
    text = whole.outputs[0].text
    assert choice["message"] == {"role": "assistant", "content": text}
    assert found["object"] == "chat.completion"
    entries = choice["logprobs"]["content"]
    assert len(entries) == 10
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    first, *chunks = call(port, CHAT, body | {"stream": True}).events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_without_max_tokens_uses_the_context(port: int) -> None:
    found = call(port, CHAT, {"messages": HELLO, **GREEDY}).json
    assert found["usage"]["total_tokens"] == 128


REFUSED: list[tuple[str, Any, int, str]] = [
    (COMPLETIONS, b"{", 400, "the body is not JSON"),
    (COMPLETIONS, b"[]", 400, "must be a JSON object"),
    (COMPLETIONS, b"null", 400, "must be a JSON object"),
    (COMPLETIONS, b"", 400, "Content-Type: application/json"),
    (COMPLETIONS, {"max_tokens": 3}, 400, "prompt: Field required"),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": "3"}, 400, "max_tokens: Input should be"),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 0}, 400, "max_tokens=0 is not allowed"),
    (COMPLETIONS, {"prompt": PROMPT, "temperature": -1}, 400, "temperature=-1.0"),
    (COMPLETIONS, {"prompt": PROMPT, "frobnicate": 1}, 400, "unknown field 'frobnicate'"),
    (COMPLETIONS, {"prompt": PROMPT, "echo": True}, 400, "echo=True is not built"),
    (COMPLETIONS, {"prompt": PROMPT, "best_of": 3}, 400, "best_of=3 is not built"),
    (COMPLETIONS, {"prompt": PROMPT, "logprobs": 21}, 400, "logprobs: Input should be"),
    (COMPLETIONS, {"prompt": PROMPT, "logit_bias": {"a": 1}}, 400, "must be token ids"),
    (COMPLETIONS, {"prompt": PROMPT, "stream_options": {}}, 400, "only with stream=true"),
    (COMPLETIONS, {"prompt": PROMPT, "priority": 1}, 400, "scheduling_policy"),
    (COMPLETIONS, {"prompt": PROMPT, "n": 13}, 400, "asks for 13 answers"),
    (COMPLETIONS, {"prompt": [PROMPT] * 7, "n": 2}, 400, "asks for 14 answers"),
    (COMPLETIONS, {"prompt": PROMPT, "bad_words": ["ab"] * 129}, 400, "at most 128 items"),
    (COMPLETIONS, {"prompt": "", "max_tokens": 3}, 400, "empty prompt"),
    (COMPLETIONS, {"prompt": [], "max_tokens": 3}, 400, "empty prompt"),
    (COMPLETIONS, {"prompt": [1] * 128}, 400, "max_model_len=128"),
    (COMPLETIONS, {"prompt": [99999]}, 400, "token id 99999"),
    (COMPLETIONS, {"prompt": PROMPT, "model": "gpt"}, 404, "'gpt' is not served here"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools="),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "is not built"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "only with logprobs=true"),
    (CHAT, {"messages": []}, 400, "conversation is empty"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "role='king'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text only"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "text=None"),
    ("/v1/nothing", {}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_said(
    port: int, path: str, body: Any, status: int, message: str, stream: bool
) -> None:
    if stream and isinstance(body, dict) and "stream_options" not in body:
        body = {**body, "stream": True}
    answer = call(port, path, body)
    assert answer.status == status, answer.raw
    assert message in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"
    assert set(answer.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_of_several_that_cannot_be_served(
    port: int, llm: AsyncLLM, stream: bool
) -> None:
    body = {"prompt": [[5, 6], [1] * 500], "max_tokens": 50, **GREEDY, "stream": stream}
    answer = call(port, COMPLETIONS, body)
    told = answer.events[-1] if answer.status == 200 else answer.json
    assert told["error"]["code"] == "context_length_exceeded"
    all_is_well(port, llm)


def test_errors_name_the_field_and_the_code(port: int) -> None:
    wrong = call(port, COMPLETIONS, {"prompt": PROMPT, "top_p": 2})
    assert wrong.error["param"] == "top_p"
    assert call(port, COMPLETIONS, {"prompt": [1] * 500}).error["code"] == "context_length_exceeded"
    assert call(port, COMPLETIONS, {"prompt": PROMPT, "model": "x"}).error["param"] == "model"
    wrong_method = call(port, COMPLETIONS, method="GET")
    assert (wrong_method.status, wrong_method.headers["allow"]) == (405, "POST")


def test_a_body_needs_its_content_type(port: int) -> None:
    body = json.dumps({"prompt": PROMPT}).encode()
    answer = call(port, COMPLETIONS, body, **{"Content-Type": "application/x-www-form-urlencoded"})
    assert (answer.status, "Content-Type" in answer.error["message"]) == (400, True)


def test_150_000_prompts_are_refused_at_once(port: int, llm: AsyncLLM) -> None:
    body = {"prompt": [[1]] * 150_000, "max_tokens": 1}
    assert "150000 prompts" in call(port, COMPLETIONS, body).error["message"]
    all_is_well(port, llm)


def test_errors_do_not_repeat_megabytes(port: int) -> None:
    for field in ("model", "stop"):
        answer = call(port, COMPLETIONS, {"prompt": PROMPT, field: ["x" * 500_000, ""]})
        assert len(answer.raw) < 2000, field
    answer = call(port, COMPLETIONS, {"prompt": PROMPT, "model": "x" * 500_000})
    assert (answer.status, len(answer.raw) < 2000) == (404, True)
    assert answer.error["message"].endswith("known are tiny, other")


def test_an_api_key_is_asked_for(llm: AsyncLLM) -> None:
    with serving(llm, api_key="sécret") as port:
        assert call(port, "/health").status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = call(port, "/v1/models", **headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


def test_a_key_opens_the_server(llm: AsyncLLM) -> None:
    with serving(llm, api_key="secret") as port:
        for scheme in ("Bearer", "bearer"):  # RFC 9110: its case does not count
            assert call(port, "/v1/models", Authorization=f"{scheme} secret").status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(port: int, llm: AsyncLLM, chunked: bool) -> None:
    body = json.dumps({"prompt": "x " * (5 << 20), "max_tokens": 3}).encode()
    assert len(body) > 10 << 20
    if chunked:
        parts = (body[i : i + 65536] for i in range(0, len(body), 65536))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(
            "POST",
            COMPLETIONS,
            parts,
            encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )
        response = connection.getresponse()
        status, error = response.status, json.loads(response.read())["error"]
        connection.close()
    else:
        answer = call(port, COMPLETIONS, body)
        status, error = answer.status, answer.error
    assert (status, error["code"]) == (413, "body_too_large")
    all_is_well(port, llm)


def test_a_prompt_of_a_megabyte_holds_nobody_up(llm: AsyncLLM) -> None:
    with serving(llm, max_body_bytes=32 << 20) as port, ThreadPoolExecutor(1) as pool:
        large = pool.submit(call, port, COMPLETIONS, {"prompt": "word " * 200_000})
        assert call(port, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3}).status == 200
        assert large.result().error["code"] == "context_length_exceeded"
        all_is_well(port, llm)


def test_a_full_queue_asks_clients_to_come_back(port: int, llm: AsyncLLM) -> None:
    streams = [begin(port, COMPLETIONS, {**ENDLESS, "stream": True}) for _ in range(12)]
    while llm.num_unfinished < 12:
        time.sleep(0.005)
    answer = call(port, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3})
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    two = call(port, COMPLETIONS, {"prompt": [PROMPT] * 2, "max_tokens": 3})
    assert two.status == 429
    for stream in streams:
        stream.close()
    all_is_well(port, llm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes(port: int, llm: AsyncLLM, stream: bool) -> None:
    """While it waits in the queue, before the first token, and in the middle of its answer."""
    many = [begin(port, COMPLETIONS, {**ENDLESS, "stream": stream}) for _ in range(8)]
    while llm.num_unfinished < 8:
        time.sleep(0.005)
    if stream:
        assert many[0].recv(10)
    for connection in many:
        connection.close()
    all_is_well(port, llm)


def test_two_hundred_aborted_streams(port: int, llm: AsyncLLM) -> None:
    def abort(i: int) -> None:
        connection = begin(port, COMPLETIONS, {**ENDLESS, "stream": True})
        if i % 2:
            connection.recv(100)
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(abort, range(200)))
    all_is_well(port, llm)


def test_a_body_that_never_comes(llm: AsyncLLM) -> None:
    with serving(llm, body_timeout_s=0.2) as port:
        connection = begin(port, COMPLETIONS, {})
        connection.close()
        with socket.create_connection(("127.0.0.1", port), 60) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            )
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        all_is_well(port, llm)


def test_headers_that_never_come(llm: AsyncLLM) -> None:
    """Of a first request, in drops, and of the next one on a connection that is kept."""
    with serving(llm, header_timeout_s=0.3) as port:
        with socket.create_connection(("127.0.0.1", port), 60) as silent:
            assert silent.recv(1000).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), 60) as slow:
            begun = time.monotonic()
            said = b""
            for drop in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 100:
                try:
                    slow.sendall(bytes([drop]))
                except OSError:
                    break  # it was disconnected
                if time.monotonic() - begun > 5:
                    break
                time.sleep(0.02)
            assert time.monotonic() - begun < 5
            slow.settimeout(60)
            try:
                said = slow.recv(1000)
            except ConnectionError:
                said = b"HTTP/1.1 408 "  # the reset overtook the answer
            assert said.startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), 60) as kept:
            for _ in range(2):
                kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")
            kept.sendall(b"GET /health HTTP/1.1\r\nHost:")
            said = kept.recv(1000)
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b"headers were not received within 0.3 s" in said
        all_is_well(port, llm)


def test_a_slow_answer_is_not_a_slow_head(llm: AsyncLLM) -> None:
    with serving(llm, header_timeout_s=0.1) as port:
        body = {"prompt": [PROMPT] * 8, "max_tokens": 100, **GREEDY}
        assert call(port, COMPLETIONS, body).status == 200
        assert call(port, COMPLETIONS, {**body, "stream": True}).status == 200


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[int] = []
    real = AsyncLLM._make_sequences

    def watched(self: AsyncLLM, request_id: str, prompt: Any, *more: Any) -> Any:
        tokenized.append(len(prompt))
        return real(self, request_id, prompt, *more)

    monkeypatch.setattr(AsyncLLM, "_make_sequences", watched)
    text = "word " * 500_000
    with serving(llm, max_body_bytes=32 << 20, chat_template=TEMPLATE) as port:
        answer = call(port, COMPLETIONS, {"prompt": text})
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert "2500000 characters" in answer.error["message"]
        parts = [{"type": "text", "text": text}]
        for content in (text, parts):
            said = call(port, CHAT, {"messages": [{"role": "user", "content": content}]})
            assert (said.status, said.error["code"]) == (400, "context_length_exceeded")
        assert tokenized == []
        # one that might fit is tokenized, and refused then
        assert call(port, COMPLETIONS, {"prompt": "word " * 300}).status == 400
        assert tokenized == [1500]
        all_is_well(port, llm)


def test_long_texts_hold_up_nobody_else(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four long texts are being tokenized, and do not end: a short prompt is answered."""
    done = threading.Event()
    real = AsyncLLM._make_sequences

    def stuck(self: AsyncLLM, request_id: str, prompt: Any, *more: Any) -> Any:
        if len(prompt) > 1000:
            assert done.wait(60)
        return real(self, request_id, prompt, *more)

    monkeypatch.setattr(AsyncLLM, "_make_sequences", stuck)
    monkeypatch.setattr(async_llm, "LONG_TEXT", 1000)
    with serving(llm) as port, ThreadPoolExecutor(4) as pool:
        long = [pool.submit(call, port, COMPLETIONS, {"prompt": "word " * 300}) for _ in range(4)]
        assert call(port, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3}).status == 200
        done.set()
        assert {answer.result().status for answer in long} == {400}
        all_is_well(port, llm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(llm: AsyncLLM, stream: bool) -> None:
    with serving(llm, request_timeout_s=0.02) as port:
        body = {"prompt": [PROMPT] * 8, "max_tokens": 100, **GREEDY}
        answer = call(port, COMPLETIONS, {**body, "stream": stream})
        if stream and answer.status == 200:
            assert answer.events[-1]["error"]["code"] == "timeout"
        else:
            assert (answer.status, answer.error["code"]) == (504, "timeout")
    with serving(llm) as port:
        all_is_well(port, llm)


def test_metrics_have_the_names_of_vllm(port: int, llm: AsyncLLM) -> None:
    call(port, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 7, **GREEDY})
    text = call(port, "/metrics").raw.decode()
    found = dict(
        line.rsplit(" ", 1)
        for line in text.splitlines()
        if not line.startswith("#") and "_bucket" not in line
    )

    def value(name: str, more: str = "") -> float:
        return float(found[f'{name}{{engine="0",{more}model_name="tiny"}}'])

    assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
    assert value("vllm:kv_cache_usage_perc") == 0
    assert value("nanovllm:engine_alive") == 1
    assert value("vllm:generation_tokens_total") >= 7
    assert value("vllm:prompt_tokens_total") > 0
    assert value("vllm:prefix_cache_queries_total") > value("vllm:prefix_cache_hits_total") >= 0
    firsts, all_tokens = (
        value("vllm:time_to_first_token_seconds_count"),
        value("vllm:generation_tokens_total"),
    )
    assert value("vllm:inter_token_latency_seconds_count") == all_tokens - firsts
    assert value("vllm:request_success_total", 'finished_reason="length",') > 0
    assert float(found["process_resident_memory_bytes"]) > 1e6
    dashboard = (Path(__file__).parents[2] / "src/nanovllm/serving/grafana.json").read_text()
    used = {
        name
        for panel in json.loads(dashboard)["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm|nanovllm|process)[:_][a-z_0-9:]+", target["expr"])
    }
    told = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    for name in used:
        base = name.removesuffix("_bucket")
        assert base in told or base.removesuffix("_total") in told, name


def test_an_engine_that_ends_is_reported(tiny: Path) -> None:
    llm = AsyncLLM(str(tiny), **SMALL)

    def broken(plan: Any) -> None:
        raise OSError("no such device")

    with serving(llm) as port:
        stream = begin(port, COMPLETIONS, {**ENDLESS, "stream": True})
        said = stream.recv(100)
        asyncio.run(llm.between_steps(lambda engine: setattr(engine.runner, "submit", broken)))
        while part := stream.recv(65536):
            said += part
            if b"[DONE]" in said:
                break
        stream.close()
        assert b"no such device" in said
        answer = call(port, COMPLETIONS, {"prompt": PROMPT})
        assert (answer.status, answer.error["code"]) == (503, "engine_dead")
        assert call(port, "/health").status == 503
        assert (
            b'nanovllm:engine_alive{engine="0",model_name="tiny"} 0.0' in call(port, "/metrics").raw
        )
    asyncio.run(llm.shutdown())


def test_a_mistake_of_the_server_is_no_mistake_of_the_client(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nanovllm.serving.responses import CompletionWriter

    def broken(*_: Any) -> Any:
        raise ValueError("a secret of ours")

    with serving(llm) as port:
        with monkeypatch.context() as patched:
            patched.setattr(CompletionWriter, "choice", broken)
            whole = call(port, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3})
            assert (whole.status, whole.error["type"]) == (500, "server_error")
            assert b"secret" not in whole.raw
            stream = call(port, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3, "stream": True})
            assert stream.events[-1]["error"]["type"] == "server_error"
            assert b"secret" not in stream.raw
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            sent = json.dumps({"prompt": PROMPT}), {"Content-Type": "application/json"}
            caplog.clear()
            caplog.set_level("INFO", "nanovllm.serving")
            for _ in range(3):  # the connection stays
                connection.request("POST", COMPLETIONS, *sent)
                response = connection.getresponse()
                assert (response.status, bool(response.read())) == (500, True)
            connection.close()
            ends = time.monotonic() + 10
            while statuses(caplog).count(500) < 3 and time.monotonic() < ends:
                time.sleep(0.01)  # a line is written after the answer
            assert statuses(caplog).count(500) == 3
        all_is_well(port, llm)


def statuses(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Of the requests that have been logged."""
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    return [f["status"] for f in fields if "status" in f]


def test_priorities_of_requests(tiny: Path) -> None:
    llm = AsyncLLM(str(tiny), scheduling_policy="priority", **SMALL)
    with serving(llm) as port:
        body = {"prompt": PROMPT, "max_tokens": 3, **GREEDY}
        texts = [call(port, COMPLETIONS, body | {"priority": p}).json["choices"] for p in (5, -5)]
        assert texts[0] == texts[1]
    asyncio.run(llm.shutdown())


def test_a_checkpoint_without_a_template_says_so(llm: AsyncLLM) -> None:
    with serving(llm) as port:
        answer = call(port, CHAT, {"messages": HELLO})
        assert (answer.status, "chat template" in answer.error["message"]) == (400, True)


def test_threads_share_one_server(port: int, offline: LLM) -> None:
    """Forty clients at once, within the limit of the queue: each gets its own answer."""
    texts = [f"{PROMPT} {i}" for i in range(40)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = [o.outputs[0].text for o in offline.generate(texts, params, use_tqdm=False)]
    gate = threading.Semaphore(10)

    def ask(text: str) -> str:
        with gate:
            body = {"prompt": text, "max_tokens": 8, **GREEDY}
            found: str = call(port, COMPLETIONS, body).json["choices"][0]["text"]
            return found

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(ask, texts)) == expected


def test_a_model_with_a_template_of_its_own(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    llm = AsyncLLM(str(folder), **SMALL)
    with serving(llm) as port:
        assert call(port, CHAT, {"messages": HELLO, "max_tokens": 2}).status == 200
    asyncio.run(llm.shutdown())
