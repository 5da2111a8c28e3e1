"""OpenAI's own Python client drives the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.serving import AsyncLLM
from tests.serving.test_async_llm import PROMPT, SMALL
from tests.serving.test_server import HELLO, TEMPLATE, all_is_well
from tests.support.http_client import serving

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

EXTRA: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(tiny), max_queue=4, **SMALL)
    yield llm
    asyncio.run(llm.shutdown())


@pytest.fixture(scope="module")
def port(llm: AsyncLLM) -> Iterator[int]:
    with serving(llm, chat_template=TEMPLATE, api_key="secret") as port:
        yield port


def client_of(port: int, key: str = "secret", **options: Any) -> Any:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=120, **options
    )


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    with client_of(port, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def text(tiny: Path) -> str:
    with LLM(str(tiny), **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text


def test_completions(client: Any, text: str) -> None:
    assert client.models.list().data[0].id == "tiny"
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, **EXTRA)
    assert found.choices[0].text == text
    assert found.usage.completion_tokens == 16


def test_streams(client: Any, text: str) -> None:
    parts, usage = [], None
    with client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        **EXTRA,
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            parts += [choice.text for choice in chunk.choices]
    assert "".join(parts) == text
    assert usage is not None
    assert usage.completion_tokens == 16


def test_chats(client: Any) -> None:
    arguments = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 9, **EXTRA}
    whole = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=3)
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) >= 3
    with client.chat.completions.create(**arguments, stream=True) as stream:
        told = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(told) == message.content


def test_the_asynchronous_client_may_break_off(port: int, llm: AsyncLLM) -> None:
    async def work() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", timeout=120
        ) as client:
            for _ in range(5):
                stream = await client.completions.create(
                    model="tiny", prompt=PROMPT, max_tokens=100, stream=True, **EXTRA
                )
                async with stream:
                    async for _ in stream:
                        break

    asyncio.run(work())
    for _ in range(500):
        if llm.num_unfinished == 0:
            break
        asyncio.run(asyncio.sleep(0.02))
    assert llm.num_unfinished == 0


def test_errors_have_the_types_of_the_client(
    client: Any, port: int, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.BadRequestError, match="max_model_len=128") as caught:
        client.completions.create(model="tiny", prompt="word " * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools=") as caught:
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt=PROMPT)
    with client_of(port, "wrong") as other, pytest.raises(openai.AuthenticationError):
        other.models.list()
    with pytest.raises(openai.BadRequestError, match="asks for 9 answers"):
        client.completions.create(model="tiny", prompt=[PROMPT] * 9)
    monkeypatch.setattr(llm, "_num_unfinished", llm.max_unfinished)
    with pytest.raises(openai.RateLimitError, match="try again later"):
        client.completions.create(model="tiny", prompt=PROMPT)


def test_the_server_is_well_after_all_that(llm: AsyncLLM) -> None:
    with serving(llm) as port:
        all_is_well(port, llm)
