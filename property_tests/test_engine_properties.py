"""The real engine on the embedded checkpoint: whatever is on, its tokens are those of HF
transformers, in any company.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams
from property_tests.support.profiles import holds
from property_tests.support.real_engine import BYTES_A_TOKEN, engine_of, reference, run, serve, tiny
from property_tests.support.strategies import EVERYTHING, SEEDS, Request, Shape, Workload, workloads

ALONE = Shape("static", False, 0, 16, 8, 1, 128)
"""Nobody else, nothing shared, nothing cut: one request in the baseline."""


@holds(fast=30, workload=workloads(longest_prompt=60))
def test_every_token_is_that_of_hf(workload: Workload) -> None:
    """Tokens of any workload under any toggles, rescored by HF: each is the reference's choice or
    within the noise of float32.
    """
    reference().assert_right(run(workload))


@holds(fast=10, workload=workloads(min_requests=3, graphs=(True,), pools=(EVERYTHING,)))
def test_replayed_graphs_change_nothing(workload: Workload) -> None:
    """Decodes replayed by bucket, with batches between two buckets and requests that end or come:
    each token is that of HF.
    """
    reference().assert_right(run(workload))


@holds(
    fast=10,
    workload=workloads(
        min_requests=4,
        max_requests=6,
        longest_prompt=8,
        longest_output=24,
        graphs=(False,),
        pools=(0, 1),
        batching=("continuous", "chunked"),
    ),
)
def test_preemption_changes_nothing(workload: Workload) -> None:
    """Pools that hold little more than the largest request, outputs longer than prompts: each token
    is that of HF.
    """
    reference().assert_right(run(workload))


@holds(fast=12, seed=SEEDS, bit=st.integers(0, 63), prompt=st.sampled_from([(3, 4), (9,) * 5]))
def test_seeds_tell_requests_apart(seed: int, bit: int, prompt: tuple[int, ...]) -> None:
    """Equal requests whose seeds differ in one bit, and such without a seed, get different tokens;
    equal seeds get equal ones.
    """
    flipped = ((seed + 2**63) ^ (1 << bit)) - 2**63
    params = [
        SamplingParams(temperature=1.7, max_tokens=8, seed=own, ignore_eos=True)
        for own in (seed, flipped, seed, None, None)
    ]
    one, other, again, *unseeded = (
        s.tokens
        for s in run(
            Workload(
                Shape("chunked", True, 0, 4, 64, 8, 64), tuple(Request(prompt, p) for p in params)
            )
        )
    )
    assert one == again, f"seed {seed} gave {one} and {again}"
    assert one != other, f"seeds {seed} and {flipped} both gave {one}"
    assert unseeded[0] != unseeded[1], f"two requests without a seed both gave {unseeded[0]}"


@holds(fast=20, workload=workloads(min_requests=2), chosen=st.integers(0, 8))
def test_company_does_not_matter(workload: Workload, chosen: int) -> None:
    """A seeded request alone and in a crowd (batched, preempted, chunked, overlapped, aborted
    neighbours): the same tokens.
    """
    request = replace(workload.requests[chosen % len(workload.requests)], abort=None)
    crowd = tuple(
        request if r is workload.requests[chosen % len(workload.requests)] else r
        for r in workload.requests
    )
    alone = run(Workload(ALONE, (replace(request, arrival=0),)))[0]
    crowded = run(replace(workload, requests=crowd))[crowd.index(request)]
    reference().assert_same(alone, crowded)


@holds(fast=12, workload=workloads(max_requests=4))
def test_a_warm_prefix_cache_does_not_matter(workload: Workload) -> None:
    """The same requests twice in one engine, cold and warm: the same tokens, and those of HF."""
    requests = tuple(replace(r, abort=None) for r in workload.requests)
    shape = replace(workload.shape, prefix_cache=True, num_blocks=workload.shape.num_blocks + 8)
    with engine_of(shape) as engine:
        cold = serve(engine, requests, "cold")
        hits = engine.stats()["prefix_hit_tokens"]
        warm = serve(engine, requests, "warm")
        hits = engine.stats()["prefix_hit_tokens"] - hits
    largest = max(len(r.prompt) for r in requests)
    tokens = sum(len(r.prompt) + r.params.max_tokens + shape.block_size for r in requests)
    evicted = shape.num_blocks * shape.block_size < 2 * tokens  # perhaps
    assert hits or evicted or largest <= shape.block_size, (
        "nothing was evicted and nothing was found"
    )
    for before, after in zip(cold, warm, strict=True):
        reference().assert_same(before, after)
    reference().assert_right(warm)


@holds(fast=8, workload=workloads(max_requests=4, longest_output=8, graphs=(False,), ranks=2))
def test_two_ranks_compute_the_same(workload: Workload) -> None:
    """Tensor parallelism over two ranks (in threads, over real process groups): each token is that
    of HF, and of one rank alone.
    """
    served = run(workload)
    reference().assert_right(served)
    if served[0].finish_reason != "abort":
        request = replace(served[0].request, arrival=0, abort=None)
        reference().assert_same(run(Workload(ALONE, (request,)))[0], served[0])


@pytest.mark.slow
@holds(
    fast=8,
    factor=5,
    workload=workloads(min_requests=3, longest_output=8, graphs=(False,)),
    cuts=st.sampled_from([1, 5, 64]),
)
def test_seeded_tokens_under_real_ranks(workload: Workload, cuts: int) -> None:
    """Two ranks in processes of their own: every request gets the tokens that it gets alone on one."""
    shape, requests = (
        workload.shape,
        tuple(replace(r, abort=None, arrival=0) for r in workload.requests),
    )
    bytes_a_rank = shape.num_blocks * shape.block_size * BYTES_A_TOKEN // 2
    toggles = {
        "batching": shape.batching,
        "prefix_cache": shape.prefix_cache,
        "overlap": shape.lag == 1,
        "tensor_parallel_size": 2,
    }
    with LLM(
        str(tiny()),
        device="cpu",
        max_model_len=128,
        max_num_seqs=shape.max_num_seqs,
        block_size=shape.block_size,
        max_num_batched_tokens=shape.max_num_seqs + cuts,
        kv_cache_memory_bytes=bytes_a_rank,
        skip_tokenizer_init=True,
        optimizations=toggles,
    ) as llm:
        served = serve(llm, requests)
        assert any(count for name, count in llm.stats().items() if name.startswith("all_reduces"))
    reference().assert_right(served)
    for one in served:
        reference().assert_same(run(Workload(ALONE, (one.request,)))[0], one)
