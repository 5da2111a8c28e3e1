"""Prices of models that are rounded, rightly and wrongly, and of the engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from experiments.engines.nanovllm import Adapter
from experiments.price import measure
from experiments.price.distances import distances
from experiments.price.measure import PriceError, compare, price_of
from experiments.price.planted import ERRORS, reader_of, round_weights
from experiments.price.reference import Reference
from experiments.price.verdicts import judge, of_all
from nanovllm.config import BASELINE

PROMPTS = 32
MARGINS = {"kl": 0.0003, "top_choice": 0.1, "log_perplexity": 0.02}
"""Of the divergence, a quarter above what int8 costs this model, so that what is wrong beyond it shows."""


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(tiny, "float32")


@pytest.fixture(scope="module")
def mutated(tiny: Path) -> Callable[..., Any]:
    """A model of `tiny` that a function has changed."""

    @cache
    def make(change: Callable[[Any], None]) -> Any:
        return Reference(tiny, "float32", mutate=change).model

    return make


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2048) for _ in range(rng.randint(24, 40))] for _ in range(PROMPTS)]


def verdict_on(reference: Reference, model: Any, prompts: list[list[int]]) -> str:
    figures = price_of(reference, reader_of(model), prompts)
    return of_all(judge(figures["prompts"], MARGINS, 0.05, "test"))


def test_the_reference_itself_costs_nothing(reference: Reference, prompts: list[list[int]]) -> None:
    engine, floor = compare(reference, reader_of(reference.model), prompts[0])
    assert len(engine) == len(floor) == len(prompts[0]) - 1
    assert float(engine.kl.max()) < 1e-20
    assert 0 < float(floor.kl.max()) < 1e-9  # rounding to float32


def test_every_position_is_compared_with_the_token_that_follows(
    reference: Reference, mutated: Callable[..., Any], prompts: list[list[int]]
) -> None:
    """Against whole tables, position by position."""
    model, ids = mutated(round_weights), torch.tensor([prompts[1]])
    with torch.inference_mode():
        exact, other = (m(input_ids=ids).logits[0, :-1] for m in (reference.model, model))
    whole = distances(exact, other, ids[0, 1:])
    found, _ = compare(reference, reader_of(model), prompts[1])
    assert torch.allclose(found.kl, whole.kl, rtol=1e-6, atol=1e-18)
    assert torch.allclose(found.log_perplexity, whole.log_perplexity, rtol=1e-6, atol=1e-12)


def test_the_whole_table_is_never_in_memory(
    reference: Reference, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part holds as many positions as fit TABLE_BYTES."""
    sizes: list[int] = []
    monkeypatch.setattr(measure, "TABLE_BYTES", 3 * 8 * 2048)

    def noted(exact: Tensor, other: Tensor, tokens: Tensor) -> Any:
        sizes.append(len(exact))
        return distances(exact, other, tokens)

    monkeypatch.setattr(measure, "distances", noted)
    compare(reference, reader_of(reference.model), prompts[0])
    assert max(sizes) == 3
    assert sum(sizes) == 2 * (len(prompts[0]) - 1)  # the engine's and the floor's


@pytest.mark.parametrize("wrong", [-1, 1])
def test_logits_of_other_positions_than_asked_are_refused(
    reference: Reference, prompts: list[list[int]], wrong: int
) -> None:
    def read(token_ids: list[int], take: Callable[[Tensor], None]) -> None:
        take(torch.zeros(len(token_ids) - 1 + wrong, 2048))

    with pytest.raises(PriceError, match=f"{len(prompts[0]) - 1}"):
        compare(reference, read, prompts[0])


def test_a_prompt_that_predicts_nothing_is_refused(reference: Reference) -> None:
    with pytest.raises(ValueError, match="two tokens or more"):
        compare(reference, reader_of(reference.model), [5])


def test_the_recipes_rounding_is_within_the_margin(
    reference: Reference, mutated: Callable[..., Any], prompts: list[list[int]]
) -> None:
    assert verdict_on(reference, mutated(round_weights), prompts) == "within margin"


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_outside_the_margin(
    reference: Reference, mutated: Callable[..., Any], prompts: list[list[int]], error: str
) -> None:
    """Each on top of the recipe's own rounding."""

    def quantized_wrongly(model: Any) -> None:
        round_weights(model)
        ERRORS[error](model)

    assert verdict_on(reference, mutated(quantized_wrongly), prompts) == "outside"


def test_coarser_rounding_costs_more(
    reference: Reference, mutated: Callable[..., Any], prompts: list[list[int]]
) -> None:
    int8, int4, grouped = (
        sum(price_of(reference, reader_of(mutated(change)), prompts[:8])["prompts"]["engine"]["kl"])
        for change in (
            round_weights,
            partial(round_weights, bits=4),
            partial(round_weights, bits=4, group=64),
        )
    )
    assert int8 < grouped < int4


# The engine


def adapter_of(model: Path, **config: Any) -> Adapter:
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "block_size": 16,
        "max_num_seqs": 4,
        "optimizations": vars(BASELINE),
        "seed": 0,
        **config,
    }
    adapter = Adapter(str(model), measure.settings_of(settings, Adapter.allowed))
    adapter.load()
    return adapter


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_engine_hands_over_its_own_logits(
    tiny: Path, reference: Reference, prompts: list[list[int]], prefix_cache: bool
) -> None:
    """The unquantized engine in float32 costs no more than float32 does, whatever is cached."""
    optimizations = {**vars(BASELINE), "prefix_cache": prefix_cache}
    adapter = adapter_of(tiny, optimizations=optimizations)
    try:
        for _ in range(2):
            engine, _ = compare(reference, adapter.prompt_logits, prompts[0])
            assert len(engine) == len(prompts[0]) - 1
            assert float(engine.kl.max()) < 1e-9
            assert not engine.lost.any()
    finally:
        adapter.close()


def test_prompts_are_read_in_steps_that_use_the_kv_cache(
    tiny: Path, reference: Reference, prompts: list[list[int]]
) -> None:
    """A prompt read in one step need not touch the cache, and would hide what rounding it costs."""
    adapter = adapter_of(tiny)
    try:
        steps_before = len(adapter._llm.step_times())
        compare(reference, adapter.prompt_logits, prompts[0])
        steps = adapter._llm.step_times()[steps_before:]
        assert [step[1] for step in steps if step[1]] == [
            min(measure.STEP_TOKENS, len(prompts[0]) - first)
            for first in range(0, len(prompts[0]), measure.STEP_TOKENS)
        ]
    finally:
        adapter.close()


def test_an_unquantized_engine_in_bfloat16_costs_about_the_noise_floor(
    tiny: Path, prompts: list[list[int]]
) -> None:
    adapter = adapter_of(tiny, dtype="bfloat16")
    try:
        figures = price_of(Reference(tiny, "bfloat16"), adapter.prompt_logits, prompts[:16])
    finally:
        adapter.close()
    engine, floor = (sum(figures["prompts"][side]["kl"]) for side in ("engine", "floor"))
    assert 0.5 < engine / floor < 2
    assert figures["engine_kl"]["q50"] < figures["engine_kl"]["q999"] <= figures["engine_kl"]["max"]


def test_engines_in_other_processes_are_refused(tiny: Path) -> None:
    adapter = Adapter(str(tiny), {})
    adapter._llm = object()
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        adapter.prompt_logits([1, 2, 3], lambda logits: None)
