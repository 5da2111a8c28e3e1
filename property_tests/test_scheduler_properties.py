"""Scheduler, block manager and prefix cache, without a model: every request gets its own tokens,
whatever happens around it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.priority import prioritize
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from property_tests.support.checked_engine import (
    LONGEST_OUTPUT,
    LONGEST_PROMPT,
    CheckedEngine,
    EngineMachine,
)
from property_tests.support.model_free import VOCAB, ModelFreeEngine, oracle
from property_tests.support.profiles import deep, examples, holds
from property_tests.support.strategies import Shape, Workload, endings, prompts, shapes, workloads

EngineMachine.TestCase.settings = settings(
    max_examples=examples(120), stateful_step_count=60 if deep() else 25
)
TestEngineMachine = EngineMachine.TestCase

STEPS = 3000 if deep() else 300


@holds(fast=150, workload=workloads(vocab_size=VOCAB, lags=(0, 1, 2), longest_prompt=20))
def test_whole_workloads(workload: Workload) -> None:
    """Requests that fit barely, arriving together or apart, some aborted: each gets the tokens that
    it would get alone.
    """
    serve(CheckedEngine(workload.shape), workload)


@settings(max_examples=examples(60))
@given(
    shape=shapes(lags=(0, 1, 2)),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST_PROMPT).map(tuple),
    output=st.integers(1, LONGEST_OUTPUT),
    arrivals=st.lists(st.sampled_from([0, 0, 0, 1, 2, 5]), min_size=2, max_size=9).map(sorted),
    room=st.sampled_from([1, 2, 9]),
)
def test_equal_requests_start_in_order_of_arrival(
    shape: Shape, prompt: tuple[int, ...], output: int, arrivals: list[int], room: int
) -> None:
    """Under every policy, also where they wait for the prefix that the first of them computes
    (CheckedEngine says who starts); and where none is preempted, they end in that order.
    """
    needed = -(-(len(prompt) + output) // shape.block_size)
    checked = CheckedEngine(replace(shape, num_blocks=room * needed))
    ended: list[str] = []
    for step in range(arrivals[-1] + 1):
        for _ in range(arrivals.count(step)):
            checked.add(prompt, output, frozenset())
        checked.step()
        ended += sorted(checked.finished - set(ended))
    while checked.engine.busy:
        checked.step()
        ended += sorted(checked.finished - set(ended))
    checked.finish()
    if not checked.engine.stats.preemptions:
        assert ended == sorted(ended)


@settings(max_examples=examples(100))
@given(
    shape=shapes(lags=(0, 1), block_sizes=(1, 2, 4), batching=("continuous", "chunked")),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(2, 5)), min_size=2, max_size=5),
    extra=st.integers(0, 4),
)
def test_preempted_requests_find_some_tokens_and_compute_the_rest(
    shape: Shape, sizes: list[tuple[int, int]], extra: int
) -> None:
    """Memory runs out all the time, and a part of what a preempted request had is still cached when
    it comes back. sizes: blocks of prompt and output. The ledger of CheckedEngine must add up.
    """
    size = shape.block_size
    num_blocks = max(map(sum, sizes)) + extra
    checked = CheckedEngine(
        replace(
            shape,
            prefix_cache=True,
            foresees=False,
            graphs=False,
            max_num_seqs=8,
            max_num_batched_tokens=200,
            num_blocks=num_blocks,
        )
    )
    for number, (prompt, output) in enumerate(sizes):
        text = (number,) * (prompt * size)
        checked.add(text, output * size, frozenset())
    checked.finish()


def serve(checked: CheckedEngine, workload: Workload) -> None:
    ids: dict[int, str] = {}
    for step in range(30):
        for i, request in enumerate(workload.requests):
            if request.arrival == step:
                ids[i] = str(len(checked.requests))
                checked.add(
                    request.prompt,
                    request.params.max_tokens,
                    frozenset(request.params.stop_token_ids),
                )
            if request.abort is not None and request.arrival + request.abort == step:
                checked.abort(ids[i])
        checked.step()
    checked.finish()


@holds(fast=40, shape=shapes(), seed=st.integers(0, 2**32))
def test_long_histories(shape: Shape, seed: int) -> None:
    """Requests come and go for thousands of steps (300 in the fast profile), so that pools fill,
    fragment and are reused.
    """
    rng = random.Random(seed)
    checked = CheckedEngine(shape)
    texts = [tuple(rng.randint(0, 1) for _ in range(LONGEST_PROMPT)) for _ in range(3)]
    for _ in range(STEPS):
        if len(checked.engine.scheduler.waiting) < 4 and rng.random() < 0.4:
            prompt = rng.choice(texts)[: rng.randint(1, LONGEST_PROMPT)]
            stops = frozenset({rng.randrange(VOCAB)} if rng.random() < 0.3 else ())
            checked.add(prompt, rng.randint(1, LONGEST_OUTPUT), stops)
        if checked.requests and rng.random() < 0.02:
            checked.abort(rng.choice(sorted(checked.requests)))
        checked.step()
    checked.finish()


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
