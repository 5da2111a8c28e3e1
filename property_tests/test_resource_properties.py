"""What an engine takes of a machine, and gives back; and what planning costs."""

from __future__ import annotations

import gc
import tempfile
import threading
import weakref
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from nanovllm.engine import kv_cache
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from property_tests.support.model_free import ModelFreeEngine
from property_tests.support.profiles import holds
from property_tests.support.ranks import in_ranks, meeting_places
from property_tests.support.real_engine import BYTES_A_TOKEN, engine_of, tiny
from property_tests.support.strategies import BATCHING, Shape


@holds(
    fast=20,
    block_size=st.sampled_from([4, 16]),
    total=st.integers(20, 400),
    used=st.integers(0, 300),
    utilization=st.sampled_from([0.5, 0.9, 1.0]),
)
def test_the_cache_leaves_others_their_memory(
    block_size: int, total: int, used: int, utilization: float
) -> None:
    """A cache sized by share of memory: with what other processes hold it stays within that share,
    and uses nearly all of it.
    """
    block = block_size * BYTES_A_TOKEN
    used = min(used, total)
    room = int(utilization * total - used + 1e-9)
    with patch.object(
        kv_cache, "memory_within", lambda *_: ((total - used) * block, total * block)
    ):
        try:
            with engine_of(
                Shape("static", False, 0, block_size, 1, 256, 256),
                kv_cache_memory_bytes=None,
                gpu_memory_utilization=utilization,
            ) as engine:
                found = engine.config.num_kv_blocks
        except ValueError as error:
            assert room < 1, f"there is room for {room} blocks: {error}"
            return
    limit = 256 * -(-128 // block_size)
    assert min(limit, room - 1) <= found <= min(limit, room), (
        f"{found} blocks where there is room for {room}"
    )


@holds(
    fast=5,
    closing=st.sampled_from(["close", "with", "failure"]),
    shape=st.sampled_from(
        [
            Shape("chunked", True, 1, 8, 8, 4, 64),
            Shape("static", False, 0, 8, 8, 4, 64, graphs=True),
        ]
    ),
)
def test_a_closed_engine_gives_everything_back(closing: str, shape: Shape) -> None:
    """Closed by name, by `with` or by a failing step: weights and KV cache are gone, though the
    engine object lives on.
    """
    with engine_of(shape) as engine:
        held = [
            weakref.ref(engine.runner.kv_caches[0][0]),
            weakref.ref(engine.runner.model.lm_head.weight),
        ]
        engine.add_request(
            "a", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=3, ignore_eos=True)
        )
        engine.step()
        if closing == "close":
            engine.close()
        elif closing == "failure":
            engine.runner.submit = None
            try:
                engine.step()
            except TypeError:
                pass
            else:
                raise AssertionError("a step that cannot be submitted raised nothing")
    gc.collect()
    assert not any(ref() is not None for ref in held), (
        f"closed by {closing}, the engine still holds its tensors"
    )


class CountingId(str):
    """A request id that counts how often it is looked at."""

    looks = 0

    def __hash__(self) -> int:
        CountingId.looks += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        CountingId.looks += 1
        return super().__eq__(other)


class CountingBlock(int):
    """A block number that counts comparisons: a search through a list compares."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        CountingBlock.looks += 1
        return super().__eq__(other)

    def __hash__(self) -> int:
        return super().__hash__()


@holds(
    fast=12,
    batching=st.sampled_from(BATCHING),
    prefix_cache=st.booleans(),
    end=st.sampled_from(["abort", "finish"]),
)
def test_leaving_costs_nothing_per_bystander(batching: str, prefix_cache: bool, end: str) -> None:
    """The end of one request among 200 looks at no more ids and blocks than its end among 20 (no
    search through a list).
    """
    costs = []
    for crowd in (20, 200):
        engine = ModelFreeEngine(Shape(batching, prefix_cache, 0, 2, 4 * crowd, crowd, 8 * crowd))
        blocks = engine.scheduler.blocks
        blocks.blank = [CountingBlock(block) for block in blocks.blank]
        for i in range(crowd):
            params = SamplingParams(max_tokens=2 if i == crowd // 2 and end == "finish" else 4)
            engine.scheduler.add(Sequence(CountingId(i), [i % 2, i % 3], params))
        engine.step()  # every prompt; the next one is the last of the one that finishes
        if end == "abort":
            CountingId.looks = CountingBlock.looks = 0
            engine.scheduler.abort(str(crowd // 2))
            costs.append(CountingId.looks + CountingBlock.looks)
        else:
            plan = engine.scheduler.schedule()
            assert plan is not None
            tokens, _ = engine.runner.collect(engine.runner.submit(plan))
            CountingId.looks = CountingBlock.looks = 0
            engine.scheduler.commit(plan, tokens)  # one request ends, the others only get a token
            costs.append(CountingId.looks + CountingBlock.looks)
    assert costs[1] <= costs[0] + 4, f"among 20 it costs {costs[0]} looks, among 200 {costs[1]}"


@holds(fast=4, least=st.integers(1, 1000), more=st.integers(0, 1000), first=st.booleans())
def test_ranks_agree_on_what_all_of_them_have(least: int, more: int, first: bool) -> None:
    """Ranks with different memory take the same number of blocks: the least."""
    values = (least, least + more) if first else (least + more, least)
    with tempfile.TemporaryDirectory() as folder:
        agreed = in_ranks(
            2, f"{folder}/r", lambda group, _: group.agree_on_least(values[group.rank])
        )
    assert agreed == [least, least], f"ranks with {values} agreed on {agreed}"


@holds(fast=2, count=st.integers(2, 3))
def test_engines_of_one_host_share_no_name(count: int) -> None:
    """Several tensor-parallel engines at once: each has its own place to meet (no fixed port, no
    fixed name).
    """
    places = meeting_places(tiny(), count)
    assert len(set(places)) == len(places) == count, f"{count} engines meet at {sorted(places)}"


@holds(fast=1, lost=st.sampled_from([0, 1]))
def test_a_lost_rank_leaves_nobody_hanging(lost: int) -> None:
    """A rank that never joins an all-reduce: the other gets an error within the stated time."""
    caught: list[BaseException] = []
    with tempfile.TemporaryDirectory() as folder:
        groups = in_ranks(2, f"{folder}/r", lambda group, _: group, timeout_s=0.3)

        def wait() -> None:
            try:
                groups[1 - lost].all_reduce(torch.ones(3))
            except RuntimeError as error:
                caught.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(2)
        hangs = waiting.is_alive()
        if hangs:  # let it go before it is judged
            groups[lost].all_reduce(torch.ones(3))
            waiting.join()
    assert not hangs, "the other rank hangs"
    assert caught, "the other rank went on without the lost one"


@holds(fast=3, least=st.integers(2, 40), more=st.integers(0, 40))
def test_ranks_hold_caches_of_one_size(least: int, more: int) -> None:
    """Two ranks that see different amounts of memory: every rank's cache has the same number of
    blocks.
    """
    block = 16 * BYTES_A_TOKEN // 2
    calls = iter([(n * block, n * block) for n in (least + more, least)])
    lock = threading.Lock()

    def memory_within(*_: int) -> tuple[int, int]:
        with lock:
            return next(calls)

    with (
        patch.object(kv_cache, "memory_within", memory_within),
        engine_of(
            Shape("static", False, 0, 16, 1, 16, 64, ranks=2),
            kv_cache_memory_bytes=None,
            gpu_memory_utilization=1.0,
        ) as engine,
    ):
        sizes = [rank.num_blocks for rank in engine.runner.ranks]
        caches = [rank.kv_caches[0][0].shape[0] for rank in engine.runner.ranks]
    assert sizes == caches == [least, least], f"ranks of one engine hold {caches} blocks"
