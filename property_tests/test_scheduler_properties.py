"""Scheduler, block manager and prefix cache, without a model: every request gets its own tokens,
whatever happens around it.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st

from property_tests.support.checked_engine import (
    LONGEST_OUTPUT,
    LONGEST_PROMPT,
    CheckedEngine,
    EngineMachine,
)
from property_tests.support.model_free import VOCAB
from property_tests.support.profiles import deep, examples, holds
from property_tests.support.strategies import Shape, Workload, shapes, workloads

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
