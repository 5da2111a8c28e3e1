"""Many clients of one engine: each gets its tokens once and in order, whatever the others do."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.priority import prioritize
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.serving import AsyncLLM
from property_tests.support.model_free import VOCAB, ModelFreeEngine, oracle
from property_tests.support.model_free_llm import (
    PATIENCE_S,
    Client,
    ModelFreeLLM,
    clients,
    pace,
    read_or_leave,
)
from property_tests.support.profiles import holds
from property_tests.support.strategies import Shape, endings, prompts, shapes

SCENES = shapes().flatmap(lambda shape: st.tuples(st.just(shape), clients(shape.block_size)))


@holds(fast=80, scene=SCENES, policy=st.sampled_from(["fcfs", "priority"]), paced=st.booleans())
def test_every_client_gets_its_answer(
    scene: tuple[Shape, list[Client]], policy: str, paced: bool
) -> None:
    """Clients of AsyncLLM that come, read slowly, close and cancel at any time: each that stays gets
    exactly the tokens of a request that runs alone, once, in order, and their end; nobody waits for
    ever; all KV blocks come back.
    """
    shape, group = scene
    if shape.batching == "static":
        policy = "fcfs"
    answers, left = asyncio.run(serve(shape, group, policy, paced))
    for client, answer in zip(group, answers, strict=True):
        check_answer(shape, client, answer)
    assert left["unfinished"] == 0, f"{left['unfinished']} requests are left in the scheduler"
    assert left["free"] == shape.num_blocks, (
        f"{shape.num_blocks - left['free']} blocks were not given back"
    )
    assert left["held"] == 0, f"{left['held']} places in the queue were not given back"


async def serve(
    shape: Shape, group: list[Client], policy: str, paced: bool
) -> tuple[list[Any], dict[str, int]]:
    llm = AsyncLLM.over(ModelFreeLLM(shape, paced), scheduling_policy=policy)
    reading = [
        asyncio.ensure_future(read_or_leave(llm, client, f"client {i}"))
        for i, client in enumerate(group)
    ]
    pacing = asyncio.ensure_future(pace(llm)) if paced else None
    _, waiting = await asyncio.wait(reading, timeout=PATIENCE_S)
    for task in waiting:
        task.cancel()
    # its threads, which are daemons, are left behind: to wait for them could take for ever
    assert not waiting, f"{len(waiting)} of {len(group)} clients wait for ever"
    answers = [await task for task in reading]
    if pacing is not None:
        pacing.cancel()

    def look(engine: Any) -> dict[str, int]:
        check_invariants(engine.scheduler)
        return {
            "unfinished": engine.scheduler.num_unfinished,
            "free": engine.scheduler.blocks.num_free,
        }

    # a paced engine stands still now; the other one may still work for those that left
    while not paced and await llm.between_steps(lambda engine: engine.has_unfinished_requests()):
        await asyncio.sleep(0.001)
    looking = asyncio.ensure_future(llm.between_steps(look))
    _, waiting = await asyncio.wait([looking], timeout=PATIENCE_S)
    assert not waiting, "the step thread does not answer"
    left = {**looking.result(), "held": llm.num_unfinished}
    await llm.shutdown()
    return answers, left


def check_answer(
    shape: Shape, client: Client, answer: list[RequestOutput] | ValueError | None
) -> None:
    needed = -(-(len(client.prompt) + client.max_tokens) // shape.block_size)
    if answer is None:
        return  # cancelled
    if isinstance(answer, ValueError):
        assert needed > shape.num_blocks, f"a request that fits is refused: {answer}"
        return
    assert needed <= shape.num_blocks, "a request that can never run is served"
    expected = oracle(list(client.prompt), client.max_tokens, client.stops)
    got: list[int] = []
    for output in answer:
        tokens = output.outputs[0].token_ids
        if client.kind == "delta":
            got += tokens
        else:
            assert tokens[: len(got)] == got, "an answer was taken back"
            got = list(tokens)
        assert got == expected[: len(got)], f"got {got}, alone it gets {expected}"
    ends = [output.finished for output in answer]
    left_early = client.how == "close" and client.leaves is not None and len(ends) == client.leaves
    if left_early and not (ends and ends[-1]):
        return
    assert ends == [False] * (len(ends) - 1) + [True], f"the outputs say finished={ends}"
    assert got == expected, f"the stream ends after {got}, alone it gets {expected}"
    reason = "stop" if expected[-1] in client.stops else "length"
    assert answer[-1].outputs[0].finish_reason == reason, "it ended for another reason"
    if client.kind == "final_only":
        assert len(answer) == 1, f"{len(answer)} outputs where only the last was asked for"


REQUESTS = st.lists(
    st.tuples(prompts([], VOCAB, 4, 16), endings(VOCAB, 10), st.integers(-2, 2), st.integers(0, 9)),
    min_size=2,
    max_size=10,
)


@holds(
    fast=60,
    shape=shapes(lags=(0, 1), batching=("continuous", "chunked"), block_sizes=(2, 4)),
    requests=REQUESTS,
    extra=st.integers(0, 4),
)
def test_lower_priority_values_go_first(shape: Shape, requests: list[Any], extra: int) -> None:
    """scheduling_policy='priority': nobody is admitted before a waiting request of a lower value, or
    of the same value that arrived earlier; who is preempted is the last in that order; tokens are
    those of a request that runs alone.
    """
    sizes = [len(prompt) + ending["max_tokens"] for prompt, ending, *_ in requests]
    # barely enough for the largest, and admission foresees nothing: many are preempted
    num_blocks = extra + max(-(-size // shape.block_size) for size in sizes)
    engine = ModelFreeEngine(replace(shape, num_blocks=num_blocks, foresees=False))
    scheduler: Any = engine.scheduler
    add = prioritize(scheduler)
    ranks: dict[str, tuple[int, int]] = {}
    start, leave = scheduler._start, scheduler._leave

    def watched_start(plan: Any, seq: Sequence, num_tokens: int) -> bool:
        started: bool = start(plan, seq, num_tokens)
        if started and not shape.prefix_cache:  # which may let one wait for another's prefix
            first = min([seq.request_id, *scheduler.waiting], key=ranks.__getitem__)
            assert first == seq.request_id, f"{seq.request_id} is admitted before {first}"
        return started

    def watched_leave(seq: Sequence, queue: Any) -> None:
        if seq.finish_reason is None:
            running = [*scheduler.prefilling, *scheduler.decoding]
            last = max(running, key=ranks.__getitem__)
            assert last == seq.request_id, f"{seq.request_id} is preempted before {last}"
        leave(seq, queue)

    scheduler._start, scheduler._leave = watched_start, watched_leave
    seqs: list[Sequence] = []
    for step in range(2000):
        for number, (prompt, ending, priority, arrival) in enumerate(requests):
            if arrival == step:
                seq = Sequence(
                    str(number),
                    list(prompt),
                    SamplingParams(max_tokens=ending["max_tokens"]),
                    stop_token_ids=frozenset(ending["stop_token_ids"]),
                )
                rank = ranks[seq.request_id] = (priority, number + 100 * step)
                add(SimpleNamespace(seq=seq, rank=rank))
                seqs.append(seq)
        engine.step()
        check_invariants(scheduler)
        if step > 9 and not engine.busy:
            break
    assert not engine.busy, "requests starve"
    for seq in seqs:
        expected = oracle(
            seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens, seq.stop_token_ids
        )
        assert seq.output_token_ids == expected, f"{seq.request_id} got other tokens than alone"
