"""Admission on a full cache: who starts can finish, what is computed is kept, and nobody waits
without a reason.
"""

from __future__ import annotations

import random

import pytest

from nanovllm.config import Optimizations, ResolvedConfig
from nanovllm.engine import admission
from nanovllm.engine.admission import Forecast
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import SamplingParams

STOP = 9


def scheduler_of(
    num_blocks: int, *, graphs: bool = False, batching: str = "chunked"
) -> ContinuousScheduler:
    config = ResolvedConfig(
        model="none",
        max_model_len=1 << 20,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        block_size=16,
        optimizations=Optimizations(batching=batching, prefix_cache=True, cuda_graphs=graphs),
    )
    stats = StepStats()
    return ContinuousScheduler(config, CachingBlockManager(num_blocks, 16, stats), stats)


def request(name: str, prompt: int, max_tokens: int) -> Sequence:
    rng = random.Random(name)
    tokens = [rng.randrange(10_000) for _ in range(prompt)]
    return Sequence(
        name, tokens, SamplingParams(max_tokens=max_tokens), stop_token_ids=frozenset({STOP})
    )


def serve(scheduler: ContinuousScheduler, used: float = 1.0) -> dict[str, int]:
    """A load of three times the cache; requests stop after `used` of their max_tokens. Counts."""
    rng = random.Random(0)
    for i in range(96):
        scheduler.add(request(str(i), rng.randint(20, 200), rng.randint(20, 200)))
    prefill_steps = 0
    while scheduler.num_unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        check_invariants(scheduler)
        prefill_steps += bool(plan.token_ids)
        seqs = [
            seq
            for seq, samples in zip(scheduler.in_flight[0][1], plan.samples, strict=True)
            if samples
        ]
        scheduler.commit(
            plan,
            [STOP if s.num_output_tokens + 1 >= used * s.params.max_tokens else 1 for s in seqs],
        )
    stats = scheduler.stats
    return {
        "steps": stats.steps,
        "prefill_steps": prefill_steps,
        "preemptions": stats.preemptions,
        "recomputed": stats.recomputed_tokens,
        "prefilled": stats.prefill_tokens,
    }


@pytest.mark.parametrize("batching", ["continuous", "chunked"])
def test_a_prefix_is_computed_once_however_many_ask_for_it(batching: str) -> None:
    scheduler = scheduler_of(2000, batching=batching)
    prefixes = [request(f"prefix {i}", 96, 1).token_ids for i in range(4)]
    for i in range(40):
        prefix = prefixes[i % 4]
        scheduler.add(
            Sequence(
                str(i),
                [*prefix, *request(f"own {i}", 8, 1).token_ids],
                SamplingParams(max_tokens=4),
            )
        )
    while scheduler.num_unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        check_invariants(scheduler)
        scheduler.commit(plan, [1] * sum(plan.samples))
    assert scheduler.stats.prefill_tokens == 4 * 96 + 40 * 8
    assert scheduler.stats.steps < 10, "they wait for a step or two, not for each other's answers"


def test_a_short_common_beginning_is_no_reason_to_wait() -> None:
    scheduler = scheduler_of(2000)
    common = request("common", 32, 1).token_ids
    for i in range(6):
        scheduler.add(
            Sequence(
                str(i),
                [*common, *request(f"own {i}", 48, 1).token_ids],
                SamplingParams(max_tokens=4),
            )
        )
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.rows) == 6


def test_what_cannot_be_found_is_no_reason_to_wait() -> None:
    """The last token of a prompt is always computed, so a prompt of one block is never found."""
    scheduler = scheduler_of(2000)
    for i in range(3):
        prompt = request("one block", 16, 1).token_ids
        scheduler.add(Sequence(str(i), prompt, SamplingParams(max_tokens=4)))
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.rows) == 3


@pytest.mark.parametrize("batching", ["continuous", "chunked"])
@pytest.mark.parametrize("used", [1.0, 0.2])
def test_little_is_computed_twice_and_no_time_is_lost(
    monkeypatch: pytest.MonkeyPatch, batching: str, used: float
) -> None:
    ours = serve(scheduler_of(320, batching=batching), used)
    monkeypatch.setattr(Forecast, "fits", lambda *_: True)  # admits whatever fits at this moment
    greedy = serve(scheduler_of(320, batching=batching), used)
    print(used, batching, ours, greedy)
    assert ours["recomputed"] <= 0.02 * ours["prefilled"]
    assert ours["preemptions"] <= max(2, greedy["preemptions"] // 4)
    assert ours["steps"] <= 1.15 * greedy["steps"]
    if used == 1.0:
        assert greedy["preemptions"] > 20, "the load must be one that thrashes without a forecast"


def test_with_graphs_requests_join_together(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = serve(scheduler_of(320, graphs=True))
    monkeypatch.setattr(admission, "GATHERED", 1 << 30)
    one_by_one = serve(scheduler_of(320))
    print(gathered, one_by_one)
    assert gathered["prefill_steps"] < 0.7 * one_by_one["prefill_steps"]
    assert gathered["steps"] < 1.1 * one_by_one["steps"]


def test_nobody_waits_where_all_fit() -> None:
    scheduler = scheduler_of(1000, graphs=True)
    for i in range(32):
        scheduler.add(request(str(i), 20, 100))
    scheduler.commit(plan := scheduler.schedule(), [1] * sum(plan.samples))  # type: ignore[union-attr,arg-type]
    while scheduler.prefilling:
        scheduler.commit(plan := scheduler.schedule(), [1] * sum(plan.samples))  # type: ignore[union-attr,arg-type]
    scheduler.add(request("late", 20, 100))
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.token_ids) == 20, "one request among 32 that run need not be gathered"


@pytest.mark.parametrize("leaves", ["ends", "is aborted"])
def test_who_fits_is_not_kept_waiting_by_those_who_did_not_before(leaves: str) -> None:
    """As many run and wait as when the cache was full, but they are others."""
    scheduler = scheduler_of(100)

    def step(token: int = 1) -> None:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, [token] * sum(plan.samples))

    short = Sequence(
        "short", [5] * 16, SamplingParams(max_tokens=850), stop_token_ids=frozenset({STOP})
    )
    for seq in (
        Sequence("long", [6] * 16, SamplingParams(max_tokens=500)),
        short,
        request("large", 1000, 300),
    ):
        scheduler.add(seq)
        step()
    assert list(scheduler.waiting) == ["large"]
    if leaves == "ends":
        step(STOP)
        step()
        assert {*scheduler.prefilling, *scheduler.decoding} == {"long", "large"}
    else:
        scheduler.abort("large")
    scheduler.add(request("small", 16, 1))
    step()
    assert not scheduler.waiting


def test_the_peak_is_at_somebodys_end() -> None:
    """Blocks of one token, so nothing is rounded: a holds 10 and gets 10 more, b holds 10 and gets
    30 more.
    """
    a, b = request("a", 10, 10), request("b", 10, 30)
    # 20 + 20 when a ends, then b alone: 40
    assert Forecast(BlockManager(40, 1, StepStats())).fits([], [a, b])
    assert not Forecast(BlockManager(39, 1, StepStats())).fits([], [a, b])
    a.params = SamplingParams(max_tokens=30)
    assert Forecast(BlockManager(80, 1, StepStats())).fits([], [a, b])
    assert not Forecast(BlockManager(79, 1, StepStats())).fits([], [a, b])


def test_it_learns_how_much_requests_use() -> None:
    forecast = Forecast(BlockManager(40, 1, StepStats()))
    long = request("long", 10, 100)
    assert not forecast.fits([], [long])
    done = request("done", 10, 100)
    done.token_ids += [1] * 20
    forecast.finished(done)
    assert forecast.fits([], [long])


def test_a_shared_prefix_counts_once() -> None:
    scheduler = scheduler_of(40)
    first = request("first", 320, 16)
    scheduler.add(first)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, [1])
    for i in range(8):  # 21 blocks each, 20 of them shared: 21 + 8 blocks in all
        scheduler.add(
            Sequence(f"again{i}", [*first.token_ids[:320], i], SamplingParams(max_tokens=8))
        )
    scheduler.schedule()
    assert len(scheduler.decoding) == 9
