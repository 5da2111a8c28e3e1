"""What AsyncLLM asks of an LLMEngine, over the model-free engine; and clients that drive it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.serving import AsyncLLM
from nanovllm.serving.answers import OutputKind
from property_tests.support.model_free import VOCAB, ModelFreeEngine
from property_tests.support.strategies import Shape, endings, prompts

LONGEST_PROMPT, LONGEST_OUTPUT = 20, 14
PATIENCE_S = 5.0
"""A model-free workload takes some milliseconds. One that takes this long waits for ever."""


class ModelFreeLLM:
    """Checks the invariants after every step. paced: it runs a step only where `permits` allow one,
    so that what happens between two steps can be looked at; else as fast as it can.
    """

    tokenizer = None
    output_of = LLMEngine.output_of

    def __init__(self, shape: Shape, paced: bool) -> None:
        self.paced, self.permits = paced, 0
        self._engine = ModelFreeEngine(shape)
        self.scheduler = self._engine.scheduler
        self.config = self.scheduler.config

    def make_sequence(
        self, request_id: str, prompt: Any, params: SamplingParams, number: int
    ) -> Sequence:
        stops = frozenset(params.stop_token_ids)
        return Sequence(
            request_id, list(prompt["prompt_token_ids"]), params, number, stop_token_ids=stops
        )

    def has_unfinished_requests(self) -> bool:
        return self._engine.busy and (self.permits > 0 or not self.paced)

    def advance(self) -> list[Sequence]:
        self.permits -= 1
        advanced = self._engine.step()
        check_invariants(self.scheduler)
        return advanced

    def abort(self, request_id: str) -> bool:
        return self.scheduler.abort(request_id) is not None

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Client:
    """One call of generate. start: turns of the event loop before it. pause: turns before each
    further read. leaves: after so many outputs, None: never. how: by closing the iterator, or by
    cancelling the task that reads it, which may be before it has got anything.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stops: frozenset[int]
    kind: OutputKind
    priority: int
    start: int
    pause: int
    leaves: int | None
    how: Literal["close", "cancel"]


@st.composite
def clients(draw: Any, block_size: int) -> list[Client]:
    found: list[Client] = []
    for _ in range(draw(st.integers(1, 7))):
        ending = draw(endings(VOCAB, LONGEST_OUTPUT))
        found.append(
            Client(
                prompt=draw(prompts([c.prompt for c in found], VOCAB, block_size, LONGEST_PROMPT)),
                max_tokens=ending["max_tokens"],
                stops=frozenset(ending["stop_token_ids"]),
                kind=draw(st.sampled_from(["delta", "cumulative", "final_only"])),
                priority=draw(st.integers(-1, 1)),
                start=draw(st.sampled_from([0, 0, 1, 5, 30])),
                pause=draw(st.sampled_from([0, 0, 1, 10])),
                leaves=draw(st.none() | st.none() | st.integers(0, 3)),
                how=draw(st.sampled_from(["close", "cancel"])),
            )
        )
    return found


def queued(engine: Any) -> set[str]:
    scheduler = engine.scheduler
    return {*scheduler.waiting, *scheduler.prefilling, *scheduler.decoding}


async def gone(llm: AsyncLLM, name: str) -> None:
    """A request that nobody reads has no place in a paced engine before its next step."""
    if llm.engine.paced:
        assert name not in await llm.between_steps(queued), f"{name} was left and goes on"


async def pace(llm: AsyncLLM) -> None:
    """Lets a paced engine run one step for each turn of the event loop."""

    def permit(engine: Any) -> None:
        engine.permits = 1

    while True:
        await llm.between_steps(permit)
        await asyncio.sleep(0)


async def read(llm: AsyncLLM, client: Client, name: str) -> list[RequestOutput] | ValueError:
    """What a client gets: its outputs, or the refusal of its request. One that closes its stream
    has no request any more before the next step.
    """
    for _ in range(client.start):
        await asyncio.sleep(0)
    params = SamplingParams(max_tokens=client.max_tokens, stop_token_ids=sorted(client.stops))
    got: list[RequestOutput] = []
    outputs = llm.generate(
        {"prompt_token_ids": list(client.prompt)},
        params,
        name,
        output_kind=client.kind,
        priority=client.priority if llm.scheduling_policy == "priority" else 0,
    )
    try:
        async for output in outputs:
            got.append(output)
            if len(got) == client.leaves and client.how == "close":
                break
            for _ in range(client.pause):
                await asyncio.sleep(0)
    except ValueError as error:
        return error
    finally:
        await outputs.aclose()
    await gone(llm, name)
    return got


async def read_or_leave(
    llm: AsyncLLM, client: Client, name: str
) -> list[RequestOutput] | ValueError | None:
    """The same; None where the client's task was cancelled, `leaves` turns after it began."""
    task = asyncio.ensure_future(read(llm, client, name))
    if client.leaves is not None and client.how == "cancel":
        for _ in range(client.start + client.leaves):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        await gone(llm, name)
        return None
    return task.result()
