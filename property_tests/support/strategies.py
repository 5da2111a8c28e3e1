"""Hypothesis strategies for whole workloads, shared by all property tests.

What engines of this kind get wrong sits at edges, so edges are drawn far more often than chance
would: lengths at and around block boundaries, prompts that are equal, nested or fully cached, pools
in which everything preempts, batches between two graph buckets, aborts in mid-flight, sampling
parameters mixed in one batch, an end of sequence at once or never, commit lag 0 and 1.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from nanovllm.sampling_params import SamplingParams

BATCHING = ("static", "continuous", "chunked")
BUCKET_EDGES = (1, 2, 3, 4, 5, 7, 8, 9)
"""Batch sizes at and around the graph buckets 1, 2, 4, 8."""


@dataclass(frozen=True)
class Shape:
    """An engine's policy and geometry. lag: steps launched before the oldest is committed (1: the
    engine's overlap).
    foresees: False where admission is told that every request ends at once, so that memory runs out
    all the time.
    """

    batching: str
    prefix_cache: bool
    lag: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    graphs: bool = False
    ranks: int = 1
    foresees: bool = True


@dataclass(frozen=True)
class Request:
    """arrival: the step before which it is added. abort: so many steps later it is aborted, if it
    still runs; None: never.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int = 0
    abort: int | None = None


@dataclass(frozen=True)
class Workload:
    shape: Shape
    requests: tuple[Request, ...]


def around(*at_a_time: int) -> st.SearchStrategy[int]:
    """Sizes of batches: few, and as many as are computed at a time, one more or less, and twice that."""
    edges = {n + d for size in at_a_time for n in (size, 2 * size) for d in (-1, 0, 1)}
    return st.sampled_from(sorted({1, 2, 3} | {n for n in edges if n > 0}))


def lengths(block_size: int, longest: int) -> st.SearchStrategy[int]:
    """1 to longest; mostly whole blocks, and one token more or less."""
    blocks = range(longest // block_size + 2)
    edges = sorted(
        {
            n
            for k in blocks
            for n in (k * block_size - 1, k * block_size, k * block_size + 1)
            if 1 <= n <= longest
        }
    )
    return st.sampled_from(edges) | st.integers(1, longest)


@st.composite
def prompts(
    draw: Any, earlier: list[tuple[int, ...]], vocab_size: int, block_size: int, longest: int
) -> tuple[int, ...]:
    """A text of its own, or an earlier prompt again, continued, or cut.

    Where the vocabulary is large the text is one of few, drawn by number: prompts share prefixes,
    and shrinking stays quick.
    """
    base: tuple[int, ...] = draw(st.sampled_from([(), *earlier[-4:]]))
    if base and draw(st.booleans()):
        return base[: draw(lengths(block_size, len(base)))]
    length = draw(lengths(block_size, longest))
    if vocab_size <= 8:
        tail = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=length)))
    else:
        rng = random.Random(draw(st.integers(0, 7)))
        tail = tuple(rng.randrange(vocab_size) for _ in range(length))
    return (base + tail)[:longest]


SEEDS = st.integers(0, 3) | st.integers(-(2**63), 2**63 - 1)


@st.composite
def samplings(draw: Any, filters: bool = True) -> dict[str, Any]:
    """Greedy, plain, top-k, top-p or both; requests of one workload draw their own."""
    kind = draw(
        st.sampled_from(
            ["greedy", "plain", "top_k", "top_p", "both"] if filters else ["greedy", "plain"]
        )
    )
    if kind == "greedy":
        return {"temperature": 0.0}
    params: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.1, 0.6, 1.0, 1.7])),
        "seed": draw(SEEDS),
    }
    if kind in ("top_k", "both"):
        params["top_k"] = draw(st.sampled_from([1, 2, 3, 20, 2048]))
    if kind in ("top_p", "both"):
        params["top_p"] = draw(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999]))
    return params


@st.composite
def endings(draw: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    """max_tokens, and stop tokens: none (so it never stops early), or every m-th token of the
    vocabulary (so it does).
    """
    stops: Any = ()
    if draw(st.sampled_from([False, False, True])):
        every = draw(st.sampled_from([2, 5]))
        # a range is short to print
        stops = range(draw(st.integers(0, every - 1)), vocab_size, every)
    max_tokens = draw(st.sampled_from([1, 2, longest // 2, longest, longest, longest]))
    return {"max_tokens": max_tokens, "stop_token_ids": stops, "ignore_eos": not stops}


@st.composite
def options(draw: Any, vocab_size: int) -> dict[str, Any]:
    """Some of the options that edit logits. Tokens of small numbers are biased, so that they come
    often, and again.
    """
    some: dict[str, Any] = {}
    if draw(st.booleans()):
        some["repetition_penalty"] = draw(st.sampled_from([0.5, 1.3, 5.0]))
    if draw(st.booleans()):
        some["frequency_penalty"] = draw(st.sampled_from([-1.0, 0.7, 2.0]))
    if draw(st.booleans()):
        some["presence_penalty"] = draw(st.sampled_from([-2.0, 1.5]))
    if draw(st.booleans()):
        every = draw(st.sampled_from([1, 7]))
        some["logit_bias"] = {
            token: draw(st.sampled_from([-3.0, 6.0]))
            for token in range(0, min(vocab_size, 40), every)
        }
    if draw(st.booleans()):
        some["min_p"] = draw(st.sampled_from([0.01, 0.2, 0.9]))
    if draw(st.booleans()):
        some["min_tokens"] = draw(st.integers(1, 5))
    return some


ABORTS = st.none() | st.none() | st.integers(0, 8)


@st.composite
def shapes(
    draw: Any,
    *,
    lags: tuple[int, ...] = (0, 1, 1),
    block_sizes: tuple[int, ...] = (1, 2, 3, 4, 8),
    batching: tuple[str, ...] = BATCHING,
) -> Shape:
    """Token budgets from one token a row up; pools from two blocks up (a workload's own may be
    tighter or roomier).
    """
    max_num_seqs = draw(st.sampled_from(BUCKET_EDGES) | st.sampled_from(BUCKET_EDGES[-4:]))
    return Shape(
        batching=draw(st.sampled_from(batching)),
        prefix_cache=draw(st.booleans()),
        lag=draw(st.sampled_from(lags)),
        block_size=draw(st.sampled_from(block_sizes)),
        num_blocks=draw(st.integers(2, 8) | st.integers(2, 24)),
        max_num_seqs=max_num_seqs,
        graphs=draw(st.booleans()),
        foresees=draw(st.booleans()),
        max_num_batched_tokens=max_num_seqs
        + draw(st.integers(0, 24) | st.sampled_from([0, 1, 60, 200, 600, 600])),
    )


EVERYTHING = -1
POOLS = (0, 1, 3, EVERYTHING, EVERYTHING)
"""Blocks beyond those of the largest request, or enough for all requests at once."""


@st.composite
def workloads(
    draw: Any,
    *,
    vocab_size: int = 2048,
    max_requests: int = 9,
    min_requests: int = 1,
    longest_prompt: int = 36,
    longest_output: int = 14,
    lags: tuple[int, ...] = (0, 1),
    graphs: tuple[bool, ...] = (False, True),
    ranks: int = 1,
    batching: tuple[str, ...] = BATCHING,
    pools: tuple[int, ...] = POOLS,
    with_options: bool = False,
) -> Workload:
    """Requests, and an engine in which each of them fits, some of them barely. Where graphs are on,
    most workloads use no filter, so that they are replayed. with_options: most requests have options
    that edit logits.
    """
    shape = draw(shapes(lags=lags, block_sizes=(2, 4, 8, 16), batching=batching))
    replayed = draw(st.sampled_from(graphs))
    filters = draw(st.sampled_from([False, False, False, True] if replayed else [False, True]))
    requests: list[Request] = []
    count = draw(
        st.integers(min_requests, max_requests) | st.integers(max_requests // 2 + 1, max_requests)
    )
    for _ in range(count):
        prompt = draw(
            prompts([r.prompt for r in requests], vocab_size, shape.block_size, longest_prompt)
        )
        given = draw(samplings(filters)) | draw(endings(vocab_size, longest_output))
        if with_options and draw(st.sampled_from([True, True, True, False])):
            given |= draw(options(vocab_size))
            given["min_tokens"] = min(given.get("min_tokens", 0), given["max_tokens"])
            # of the small numbers, which are biased; few are short to print
            given["stop_token_ids"] = [t for t in given["stop_token_ids"] if t < 60]
        params = SamplingParams(**given)
        arrival = draw(st.sampled_from([0, 0, 0, 1, 2, 5, 12]))
        requests.append(Request(prompt, params, arrival, draw(ABORTS)))
    needed = [-(-(len(r.prompt) + r.params.max_tokens) // shape.block_size) for r in requests]
    extra = draw(st.sampled_from(pools))
    num_blocks = sum(needed) if extra == EVERYTHING else max(needed) + extra
    return Workload(
        replace(shape, num_blocks=num_blocks, graphs=replayed, ranks=ranks), tuple(requests)
    )
