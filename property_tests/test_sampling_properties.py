"""What is sampled follows the distribution that was asked for, exactly in its support and by
chi-square in its frequencies.

LEVEL is the false-alarm probability of one test of frequencies. So far out in its tail the
chi-square approximation is too optimistic, by less than 20 times where cells hold 50 expected
counts or more; so 50 repetitions of the fast profile, some 2,500 tests, raise a false alarm with a
probability below 1 %.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tokenizers import Tokenizer

from experiments.gate.edited_logits import FAR_BELOW, edited
from nanovllm.engine.details import INCOMPLETE
from nanovllm.kernels.torch import sampling
from nanovllm.requests import logit_processors, stop_strings
from nanovllm.sampling_params import SamplingParams
from property_tests.support.profiles import holds
from property_tests.support.real_engine import VOCAB, engine_of, reference, run, serve, tiny
from property_tests.support.strategies import (
    BATCHING,
    SEEDS,
    Shape,
    Workload,
    options,
    workloads,
)

LEVEL = 1e-7
CELL = 50
"""Least number of expected counts in a cell; rarer tokens are counted together."""

FILTERS = st.tuples(
    st.sampled_from([0.2, 0.6, 1.0, 1.7]),
    st.sampled_from([0, -1, 1, 2, 5, 17, 5000]),
    st.sampled_from([1e-6, 0.3, 0.8, 0.95, 1.0]),
)
"""(temperature, top_k, top_p)"""


def probabilities(
    logits: NDArray[np.float64], temperature: float, top_k: int, top_p: float
) -> NDArray[np.float64]:
    """The definition, in float64: of the k largest, the smallest set of the largest whose mass
    reaches p.
    """
    scaled = logits / temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled[order] - scaled[order[0]])
    if top_k > 0:
        p[top_k:] = 0.0
    p /= p.sum()
    if top_p < 1:
        p[1:][np.cumsum(p)[:-1] >= top_p] = 0.0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


def assert_distributed(tokens: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """Counts against `expected` [vocab], probabilities: nothing outside its support, and chi-square
    within it.
    """
    counts = np.bincount(tokens, minlength=len(expected))
    outside = (expected == 0) & (counts > 0)
    assert not outside.any(), (
        f"tokens {np.flatnonzero(outside)[:5].tolist()} were sampled, which the filters drop"
    )
    wanted = expected * len(tokens)
    common = np.flatnonzero(wanted >= CELL)
    observed, wanted = counts[common], wanted[common]
    rest = len(tokens) - wanted.sum()
    if rest >= CELL:
        observed, wanted = (
            np.append(observed, len(tokens) - observed.sum()),
            np.append(wanted, rest),
        )
    else:
        assert (
            stats.binom.sf(
                len(tokens) - observed.sum() - 1, len(tokens), min(1.0, rest / len(tokens) + 1e-9)
            )
            > LEVEL
        ), "rare tokens were sampled too often"
        wanted *= observed.sum() / wanted.sum()
    if len(wanted) > 1:
        p_value = stats.chisquare(observed, wanted, sum_check=False).pvalue
        assert p_value > LEVEL, (
            f"{len(tokens)} tokens do not follow the distribution: p = {p_value:.1e} in {len(wanted)} cells"
        )


def expected_of(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> NDArray[np.float64] | None:
    """Their probabilities. None where the mass reaches p within rounding: then either set is right,
    so nothing can be said.
    """
    exact = logits.double().numpy()
    low, high = (
        probabilities(exact, temperature, top_k, p)
        for p in (top_p * (1 - 1e-5), min(1.0, top_p * (1 + 1e-5)))
    )
    middle = probabilities(exact, temperature, top_k, top_p)
    return None if ((low > 0) != (high > 0)).any() else middle


@holds(
    fast=40,
    text=st.integers(0, 2**20),
    filters=FILTERS,
    seed=SEEDS,
    over=st.sampled_from(["positions", "seeds"]),
)
def test_frequencies_follow_the_filtered_softmax(
    text: int, filters: tuple[float, int, float], seed: int, over: str
) -> None:
    """The sampler on random logits: support exactly, frequencies by chi-square; over the positions
    of one seed, and over seeds.
    """
    logits = torch.randn(29, generator=torch.Generator().manual_seed(text)) * 2
    temperature, top_k, top_p = filters
    if (expected := expected_of(logits, *filters)) is None:
        return
    n = 4000
    steps = torch.arange(n)
    seeds, positions = (
        (torch.full((n,), seed), steps)
        if over == "positions"
        else (seed // 2 + steps, torch.full((n,), 17))
    )
    tokens = sampling.sample(
        logits.expand(n, -1),
        torch.full((n,), temperature),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
        seeds,
        positions,
        all_greedy=False,
        any_top_k_top_p=top_k > 0 or top_p < 1,
    )
    assert_distributed(tokens.numpy(), expected)


@cache
def last_logits(prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = (
            reference().rescorer.reference(input_ids=torch.tensor([prompt])).logits[0, -1]
        )
    return logits


PROMPTS = st.sampled_from([(5, 6, 7), (9,) * 4])


@holds(
    fast=6,
    filters=FILTERS,
    batching=st.sampled_from(BATCHING),
    seeded=st.booleans(),
    prompt=PROMPTS,
    graphs=st.booleans(),
    prefix_cache=st.booleans(),
)
def test_an_engine_samples_what_hf_would(
    filters: tuple[float, int, float],
    batching: str,
    seeded: bool,
    prompt: tuple[int, ...],
    graphs: bool,
    prefix_cache: bool,
) -> None:
    """Many requests with one prompt, each with its own seed or with none: their first tokens follow
    HF's distribution.
    """
    temperature, top_k, top_p = filters
    if (expected := expected_of(last_logits(prompt), *filters)) is None:
        return
    n = 600
    shape = Shape(batching, prefix_cache, 0, 4, 2 * 64, 64, 256, graphs=graphs)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=1, ignore_eos=True
    )
    with engine_of(shape) as engine:
        for i in range(n):
            own = replace(params, seed=i * 2**33 + 11) if seeded else params
            engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, own)
        tokens = [
            o.outputs[0].token_ids[0]
            for _ in range(n)
            if engine.has_unfinished_requests()
            for o in engine.step()
        ]
    assert len(tokens) == n, f"{n} requests gave {len(tokens)} tokens"
    assert len(expected) == VOCAB
    assert_distributed(np.array(tokens), expected)


@holds(fast=60, text=st.integers(0, 2**20), filters=st.lists(FILTERS, min_size=1, max_size=5))
def test_filters_keep_what_they_say(text: int, filters: list[tuple[float, int, float]]) -> None:
    """Top-k and top-p of a batch with a filter of its own in each row: exactly the tokens of the
    definition are kept.
    """
    from nanovllm.kernels.torch.filtering import filtered_logits

    logits = torch.randn(len(filters), 53, generator=torch.Generator().manual_seed(text)) * 2
    temperatures, top_ks, top_ps = (torch.tensor(column) for column in zip(*filters, strict=True))
    kept = filtered_logits(logits, temperatures.float(), top_ks, top_ps.float()) > -torch.inf
    for row, own, keeps in zip(logits, filters, kept, strict=True):
        if (expected := expected_of(row, *own)) is not None:
            wanted = np.flatnonzero(expected).tolist()
            assert keeps.nonzero().flatten().tolist() == wanted, (
                f"temperature, top_k, top_p = {own} keep {wanted} of {row.tolist()}"
            )


@holds(
    fast=40,
    text=st.integers(0, 2**20),
    temperatures=st.lists(st.sampled_from([0.0, 0.3, 1.0, 3.0]), min_size=1, max_size=6),
    top_k=st.sampled_from([0, 3]),
    seed=SEEDS,
)
def test_rows_of_a_batch_do_not_meet(
    text: int, temperatures: list[float], top_k: int, seed: int
) -> None:
    """Greedy rows take the largest logit, and every row gets what it gets alone."""
    n = len(temperatures)
    logits = torch.randn(n, 211, generator=torch.Generator().manual_seed(text)) * 3
    columns = [
        logits,
        torch.tensor(temperatures),
        torch.full((n,), top_k),
        torch.ones(n),
        seed // 2 + torch.arange(n),
        3 * torch.arange(n),
    ]

    def sample(rows: slice) -> torch.Tensor:
        flags = {"all_greedy": not any(temperatures[rows]), "any_top_k_top_p": top_k > 0}
        return sampling.sample(*(column[rows] for column in columns), **flags)

    together = sample(slice(n))
    for i, temperature in enumerate(temperatures):
        assert sample(slice(i, i + 1))[0] == together[i], f"row {i} gets another token alone"
        if temperature == 0:
            assert together[i] == logits[i].argmax(), (
                f"greedy row {i} does not take the largest logit"
            )


# -- options: what few requests ask for ------------------------------------------------------------

SMALL_VOCAB = 12


@holds(fast=24, workload=workloads(longest_prompt=20, with_options=True))
def test_options_give_the_tokens_of_hf(workload: Workload) -> None:
    """Bias, penalties, min_p, min_tokens under any toggles, preempted, chunked, overlapped: each token is that of HF."""
    reference().assert_right(run(workload))


@holds(
    fast=8,
    workload=workloads(
        max_requests=3, longest_output=10, graphs=(False,), ranks=2, with_options=True
    ),
)
def test_ranks_apply_options_alike(workload: Workload) -> None:
    """Two tensor-parallel ranks, each with half of the vocabulary: requests with options get the tokens of HF."""
    reference().assert_right(run(workload))


@holds(fast=8, workload=workloads(max_requests=4, graphs=(False,), with_options=True))
def test_a_cached_prefix_keeps_its_tokens_in_mind(workload: Workload) -> None:
    """Requests with options twice in one engine: penalties count prompts whose KV was found, too."""
    requests = tuple(replace(r, abort=None) for r in workload.requests)
    shape = replace(workload.shape, prefix_cache=True, num_blocks=workload.shape.num_blocks + 8)
    with engine_of(shape) as engine:
        cold, warm = serve(engine, requests, "cold"), serve(engine, requests, "warm")
    for before, after in zip(cold, warm, strict=True):
        reference().assert_same(before, after)
    reference().assert_right(warm)


TOKENS = st.lists(st.integers(0, SMALL_VOCAB - 1), min_size=1, max_size=8)


@holds(
    fast=150,
    text=st.integers(0, 2**20),
    prompt=TOKENS,
    answer=TOKENS,
    known=st.integers(0, 8),
    some=options(SMALL_VOCAB),
    words=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=4),
)
def test_logits_are_edited_as_defined(
    text: int,
    prompt: list[int],
    answer: list[int],
    known: int,
    some: dict[str, Any],
    words: list[list[int]],
) -> None:
    """Token by token, from a start in mid-answer as after a preemption, edited logits are those of the definition."""
    known = min(known, len(answer))
    edits: dict[str, Any] = {}
    ends = [3, 5]
    if words:
        edits["bad_words"] = words
    if "min_tokens" in some:
        edits["not_yet"] = some["min_tokens"], ends
    if "logit_bias" in some:
        edits["logit_bias"] = some["logit_bias"]
    penalties = tuple(
        some.get(name, nothing)
        for name, nothing in (
            ("repetition_penalty", 1.0),
            ("frequency_penalty", 0.0),
            ("presence_penalty", 0.0),
        )
    )
    if penalties != (1.0, 0.0, 0.0):
        edits["penalties"] = penalties
    state = logit_processors.RowState.of(
        (edits, len(prompt), prompt + answer[:known]), SMALL_VOCAB, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(text)
    request: Any = {"prompt_token_ids": prompt, "bad_words": words, "stop_token_ids": ends, **some}
    for place in range(known, len(answer) + 1):
        logits = torch.randn(SMALL_VOCAB, generator=generator) * 3
        expected = edited(logits.double(), request, answer[:place], ())
        banned = expected <= expected.max() - FAR_BELOW
        found = logits.clone()
        state.edit(found, len(prompt) + place)
        assert ((found == -torch.inf) == banned).all(), (
            f"banned are {found.isneginf().nonzero().flatten().tolist()}, "
            f"should be {banned.nonzero().flatten().tolist()}"
        )
        difference = float((found - expected)[~banned].abs().max()) if not banned.all() else 0.0
        assert difference < 1e-4, f"after {answer[:place]} a logit is off by {difference:.3g}"
        if place < len(answer):
            state.count(torch.tensor([answer[place]]))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(tiny() / "tokenizer.json"))


PIECES = ["the ", "end", "é", "日本", "🙂", "\n", "a", ".", "stop", "<", "x y"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join)


@holds(
    fast=150,
    text=TEXTS,
    cuts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=3),
    include=st.booleans(),
    ignored=st.integers(0, 4),
)
def test_a_stop_string_ends_the_text(
    text: str, cuts: list[tuple[int, int]], include: bool, ignored: int
) -> None:
    """Strings cut from the text, across tokens and characters of several bytes: it ends at the first that is complete."""
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    whole = tokenizer().decode(ids)
    stops = tuple(
        whole[at % len(whole) : at % len(whole) + length] for at, length in cuts if whole
    ) or ("?",)
    watch = stop_strings.StopStrings(tokenizer(), stops, include=include, ignored_tokens=ignored)
    for count in range(1, len(ids) + 1):
        found = watch.add(ids[count - 1])
        so_far = tokenizer().decode(ids[:count])
        if so_far.endswith(INCOMPLETE) and not whole.startswith(so_far):
            assert found is None, f"stopped at {found!r} within a character"
            continue
        assert INCOMPLETE not in watch.settled_text or INCOMPLETE in whole
        ignored_text = tokenizer().decode(ids[: min(ignored, count)]).rstrip(INCOMPLETE)
        # the definition: complete in what has been said, and not before the ignored tokens end
        complete = [
            stop
            for stop in stops
            if any(
                so_far.startswith(stop, at) and at + len(stop) > len(ignored_text)
                for at in range(len(so_far))
            )
        ]
        if count <= ignored:
            complete = []
        assert (found is not None) == bool(complete), (
            f"{stops} in {so_far!r} ({ignored} tokens ignored): found {found!r}, should be one of {complete}"
        )
        if found is not None:
            assert found == complete[0]
            at = len(watch.text) - (len(found) if include else 0)
            assert so_far.startswith(watch.text)
            assert so_far.startswith(found, at)
            assert len(watch.settled_text) <= len(watch.text)
            return
        assert so_far.startswith(watch.settled_text)
