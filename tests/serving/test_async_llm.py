"""AsyncLLM on the embedded checkpoint: the answers of `LLM`, one `async for` each."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.llm_engine import EngineDeadError
from nanovllm.serving import AsyncLLM, QueueFullError

SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "kv_cache_memory_bytes": 2**21,
    "optimizations": {"batching": "chunked", "prefix_cache": True, "overlap": True},
}
PROMPT = "Beautiful is better than"
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(tiny), max_queue=60, **SMALL)
    yield llm
    asyncio.run(llm.shutdown())


@pytest.fixture
def own(tiny: Path) -> Iterator[AsyncLLM]:
    """An engine that a test may break."""
    llm = AsyncLLM(str(tiny), max_queue=60, **SMALL)
    yield llm
    asyncio.run(llm.shutdown())


def run(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


async def collect(llm: AsyncLLM, *args: Any, **kwargs: Any) -> list[RequestOutput]:
    return [output async for output in llm.generate(*args, **kwargs)]


async def rest(outputs: Any) -> None:
    """Reads it to its end."""
    async for _ in outputs:
        pass


async def nothing_left(llm: AsyncLLM) -> None:
    """All blocks are back, and nobody is counted as unfinished."""

    def look(engine: Any) -> tuple[int, int]:
        check_invariants(engine.scheduler)
        blocks = engine.scheduler.blocks
        return engine.scheduler.num_unfinished, blocks.num_blocks - blocks.num_free

    assert await llm.between_steps(look) == (0, 0)
    assert llm.num_unfinished == 0


def close(one: Any, other: Any) -> bool:
    """The same tokens with the same log-probabilities, but for the noise of another batch."""
    if one is None or other is None:
        return one is other
    return all(
        entry is wanted
        or (
            entry.keys() == wanted.keys()
            and all(abs(entry[t].logprob - wanted[t].logprob) < 1e-4 for t in wanted)
            and all(entry[t].decoded_token == wanted[t].decoded_token for t in wanted)
        )
        for entry, wanted in zip(one, other, strict=True)
    )


def mixture() -> list[tuple[Any, SamplingParams]]:
    rng = random.Random(5)
    tokens = [[rng.randrange(10, 2000) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    params = [
        SamplingParams(max_tokens=20, seed=1),
        SamplingParams(max_tokens=20, temperature=0, logprobs=2),
        SamplingParams(max_tokens=30, seed=2, n=3, temperature=0.9),
        SamplingParams(max_tokens=30, seed=3, repetition_penalty=1.3),
        SamplingParams(max_tokens=40, temperature=0, stop=["e", "qu"]),
        SamplingParams(max_tokens=40, temperature=0, stop=["e"], include_stop_str_in_output=True),
        SamplingParams(max_tokens=20, seed=4, stop_token_ids=list(range(0, 2048, 7))),
        SamplingParams(max_tokens=10, seed=5, prompt_logprobs=1),
    ]
    return [
        *zip([{"prompt_token_ids": prompt} for prompt in tokens], params, strict=True),
        (PROMPT, SamplingParams(max_tokens=12, seed=6, skip_special_tokens=False)),
        ({"prompt": PROMPT}, SamplingParams(max_tokens=12, seed=7, detokenize=False)),
    ]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[RequestOutput]:
    with LLM(str(tiny), **SMALL) as llm:
        prompts, params = zip(*mixture(), strict=True)
        return llm.generate(list(prompts), list(params), use_tqdm=False)


@pytest.mark.parametrize("kind", ["cumulative", "final_only", "delta"])
def test_answers_are_those_of_llm(llm: AsyncLLM, expected: list[RequestOutput], kind: Any) -> None:
    async def work() -> list[list[RequestOutput]]:
        reading = (collect(llm, *request, output_kind=kind) for request in mixture())
        found = await asyncio.gather(*reading)
        await nothing_left(llm)
        return found

    for outputs, whole in zip(run(work()), expected, strict=True):
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        last = outputs[-1]
        assert last.prompt == whole.prompt
        assert last.prompt_token_ids == whole.prompt_token_ids
        assert close(last.prompt_logprobs, whole.prompt_logprobs)
        assert last.metrics.first_token_time is not None
        assert last.metrics.finished_time is not None
        for completion in whole.outputs:
            parts = [o for out in outputs for o in out.outputs if o.index == completion.index]
            if kind != "delta":
                assert close(parts[-1].logprobs, completion.logprobs)
                plain: Any = {"logprobs": None, "cumulative_logprob": None}
                assert replace(parts[-1], **plain) == replace(completion, **plain)
                for earlier, later in pairwise(parts):
                    assert later.text.startswith(earlier.text), "a text was taken back"
                continue
            assert "".join(part.text for part in parts) == completion.text
            assert [t for part in parts for t in part.token_ids] == completion.token_ids
            if completion.logprobs is not None:
                told = [entry for part in parts for entry in part.logprobs or ()]
                assert close(told, completion.logprobs)
                total = completion.cumulative_logprob
                assert parts[-1].cumulative_logprob == pytest.approx(total, abs=1e-4)
            assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
            assert parts[-1].finish_reason == completion.finish_reason
            assert parts[-1].stop_reason == completion.stop_reason


def test_a_request_that_nobody_reads_any_more_gives_its_blocks_back(llm: AsyncLLM) -> None:
    async def work() -> None:
        async for _ in llm.generate(PROMPT, LONG):
            break
        outputs = llm.generate(PROMPT, LONG)
        await anext(outputs)
        await outputs.aclose()
        task = asyncio.ensure_future(collect(llm, PROMPT, LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        unstarted = asyncio.ensure_future(collect(llm, PROMPT, LONG))
        await asyncio.sleep(0)
        unstarted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unstarted
        await asyncio.sleep(0.05)  # what was left to the garbage collector is closed by the loop
        await nothing_left(llm)

    run(work())


def test_two_hundred_streams_that_break_off(llm: AsyncLLM) -> None:
    async def leave(i: int) -> None:
        outputs = llm.generate(PROMPT, LONG)
        for _ in range(i % 3):
            await anext(outputs)
        await outputs.aclose()

    async def work() -> None:
        for first in range(0, 200, 50):
            await asyncio.gather(*map(leave, range(first, first + 50)))
        await nothing_left(llm)
        assert len(await collect(llm, PROMPT, SHORT, output_kind="final_only")) == 1

    run(work())


def test_abort_by_id_ends_the_stream(llm: AsyncLLM) -> None:
    async def work() -> None:
        await llm.abort("nobody")
        outputs = llm.generate(PROMPT, LONG, "mine")
        first = await anext(outputs)
        await llm.abort("mine")
        last = [output async for output in outputs][-1]
        assert (first.request_id, last.outputs[0].finish_reason) == ("mine", "abort")
        assert last.finished
        assert len(last.outputs[0].token_ids) < 100
        await nothing_left(llm)

    run(work())


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ({"prompt_token_ids": []}, SHORT, "empty prompt"),
        ({"prompt_token_ids": [1] * 128}, SHORT, "shorten it or raise max_model_len"),
        ({"prompt_token_ids": [99999]}, SHORT, "token id 99999"),
        ("x " * 500, SHORT, "shorten it"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    llm: AsyncLLM, prompt: Any, params: SamplingParams, message: str
) -> None:
    async def work() -> None:
        with pytest.raises(ValueError, match=message):
            await collect(llm, prompt, params)
        await nothing_left(llm)

    run(work())


def test_ids_kinds_and_priorities_are_checked(llm: AsyncLLM) -> None:
    async def work() -> None:
        outputs = llm.generate(PROMPT, LONG, "a")
        await anext(outputs)
        with pytest.raises(ValueError, match="'a' is already in use"):
            await collect(llm, PROMPT, SHORT, "a")
        await outputs.aclose()
        assert await collect(llm, PROMPT, SHORT, "a"), "the id is free again"
        with pytest.raises(ValueError, match="allowed are cumulative, delta, final_only"):
            await collect(llm, PROMPT, SHORT, output_kind="all")
        with pytest.raises(ValueError, match="scheduling_policy='priority'"):
            await collect(llm, PROMPT, SHORT, priority=1)
        with pytest.raises(ValueError, match="n=65 is more than the 64"):
            await collect(llm, PROMPT, SamplingParams(n=65))
        await nothing_left(llm)

    run(work())


def test_a_full_queue_refuses_and_recovers(llm: AsyncLLM) -> None:
    async def work() -> None:
        reading = [asyncio.ensure_future(collect(llm, PROMPT, LONG)) for _ in range(64)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="64 requests are unfinished, of 64"):
            await collect(llm, PROMPT, SHORT)
        for task in reading[10:]:
            task.cancel()
        await asyncio.wait(reading)
        assert await collect(llm, PROMPT, SHORT)
        assert all(len(task.result()[-1].outputs[0].token_ids) == 100 for task in reading[:10])
        await nothing_left(llm)

    run(work())


def test_a_slow_reader_gets_everything_in_fewer_outputs(llm: AsyncLLM) -> None:
    async def work() -> None:
        tokens, outputs = [], 0
        async for output in llm.generate(PROMPT, LONG, output_kind="delta"):
            tokens += output.outputs[0].token_ids
            outputs += 1
            await asyncio.sleep(0.3)
        assert (len(tokens), outputs < 100) == (100, True)

    run(work())


def test_steps_do_not_wait_for_a_tokenizer(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one prompt is being tokenized, another request is served to its end."""
    waiting, go_on = threading.Event(), threading.Event()
    real = llm._make_sequences

    def slow(request_id: str, *rest: Any) -> Any:
        if request_id == "slow":
            waiting.set()
            assert go_on.wait(60)
        return real(request_id, *rest)

    monkeypatch.setattr(llm, "_make_sequences", slow)

    async def work() -> None:
        held = asyncio.ensure_future(collect(llm, PROMPT, SHORT, "slow"))
        await asyncio.to_thread(waiting.wait, 60)
        assert await collect(llm, PROMPT, SHORT)
        assert not held.done()
        go_on.set()
        assert await held

    run(work())


def test_steps_do_not_wait_for_outputs(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is computed to its end while the thread that writes texts does nothing."""
    from nanovllm.serving.answers import GrowingText

    go_on = threading.Event()
    real = GrowingText.add

    def slow(self: GrowingText, token_ids: list[int]) -> str:
        assert go_on.wait(60)
        return real(self, token_ids)

    monkeypatch.setattr(GrowingText, "add", slow)

    async def work() -> None:
        reading = asyncio.ensure_future(collect(llm, PROMPT, SHORT))
        while not await llm.between_steps(lambda engine: engine.scheduler.num_unfinished):
            await asyncio.sleep(0.01)
        while await llm.between_steps(lambda engine: engine.scheduler.num_unfinished):
            await asyncio.sleep(0.01)
        assert not reading.done()
        go_on.set()
        assert (await reading)[-1].finished

    run(work())


def test_a_step_that_fails_reaches_every_reader(own: AsyncLLM) -> None:
    async def work() -> None:
        first = own.generate(PROMPT, LONG)
        second = asyncio.ensure_future(collect(own, PROMPT, LONG))
        await anext(first)

        def broken(plan: Any) -> None:
            raise OSError("no such device")

        await own.between_steps(lambda engine: setattr(engine.runner, "submit", broken))
        with pytest.raises(EngineDeadError, match="OSError: no such device"):
            await rest(first)
        with pytest.raises(EngineDeadError, match="no such device"):
            await second
        with pytest.raises(EngineDeadError, match="no such device"):
            await collect(own, PROMPT, SHORT)
        with pytest.raises(EngineDeadError):
            await own.check_health()
        assert own.errored
        with pytest.raises(RuntimeError, match="has ended"):
            await own.between_steps(lambda engine: None)

    run(work())


def test_a_draining_shutdown_lets_readers_finish(own: AsyncLLM) -> None:
    async def work() -> None:
        reading = asyncio.ensure_future(collect(own, PROMPT, LONG))
        await asyncio.sleep(0.05)
        ending = asyncio.ensure_future(own.shutdown(drain=True))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(own, PROMPT, SHORT)
        await ending
        assert len((await reading)[-1].outputs[0].token_ids) == 100
        await own.shutdown()

    run(work())


@pytest.mark.parametrize("drain", [False, True])
def test_a_shutdown_cuts_off_what_takes_too_long(own: AsyncLLM, drain: bool) -> None:
    async def work() -> None:
        outputs = own.generate(PROMPT, LONG)
        await anext(outputs)  # and is not read on
        await own.shutdown(drain=drain, timeout_s=0.1)
        with pytest.raises(EngineDeadError, match="shut down"):
            await rest(outputs)

    run(work())


def test_a_closed_event_loop_ends_its_requests(llm: AsyncLLM) -> None:
    loop = asyncio.new_event_loop()
    outputs = llm.generate(PROMPT, LONG)
    loop.run_until_complete(anext(outputs))
    loop.close()

    async def work() -> None:
        for _ in range(500):
            left = await llm.between_steps(lambda engine: engine.scheduler.num_unfinished)
            if not left:
                break
            await asyncio.sleep(0.02)
        assert left == 0

    run(work())
    run(outputs.aclose())
    run(nothing_left(llm))


def test_priorities_order_who_waits(tiny: Path) -> None:
    async def work() -> None:
        arguments = {**SMALL, "max_num_seqs": 1}
        async with AsyncLLM(str(tiny), scheduling_policy="priority", **arguments) as llm:
            ended: list[str] = []

            async def one(name: str, priority: int) -> None:
                await collect(llm, PROMPT, LONG if name == "first" else SHORT, priority=priority)
                ended.append(name)

            first = asyncio.ensure_future(one("first", 9))
            while not await llm.between_steps(lambda engine: engine.scheduler.num_unfinished):
                await asyncio.sleep(0.005)
            some = {"late": 5, "later": 5, "soon": -1, "middle": 0}
            await asyncio.gather(*(one(name, value) for name, value in some.items()), first)
            assert ended == ["first", "soon", "middle", "late", "later"]

    run(work())


def test_settings_are_checked(tiny: Path) -> None:
    with pytest.raises(ValueError, match="scheduling_policy='sjf' is not allowed"):
        AsyncLLM(str(tiny), scheduling_policy="sjf")
    with pytest.raises(ValueError, match="max_queue=-1"):
        AsyncLLM(str(tiny), max_queue=-1)
    with pytest.raises(ValueError, match="needs batching"):
        AsyncLLM(
            str(tiny),
            scheduling_policy="priority",
            **{**SMALL, "optimizations": {"batching": "static"}},
        )
