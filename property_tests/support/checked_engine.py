"""A model-free engine that is checked after every step, and the state machine that drives it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.prefix_cache import CachedBlock, CachingBlockManager
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import SamplingParams
from property_tests.support.model_free import VOCAB, ModelFreeEngine, numbers_of, oracle
from property_tests.support.plain_forecast import check_forecast
from property_tests.support.strategies import Shape, endings, prompts, shapes

LONGEST_PROMPT, LONGEST_OUTPUT = 30, 14
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.5, "top_k": 3},
    {"top_p": 0.9},
)
"""Of a prompt, by the sum of its tokens; without a model, they change what a plan says only."""


class CheckedEngine:
    """Every request gets the tokens that it would get alone, whatever the policy, pool, arrivals,
    sharing, preemption, aborts, lag.

    After each step: the structure holds together (`check_invariants`: no block owned twice,
    reference counts equal owners, free and owned add up); a cached entry's block holds what its
    tokens and all before them must have left there; no request is lost or finished twice; no token
    differs from the oracle's; admission's forecast is the plain one.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, self.engine = shape, ModelFreeEngine(shape)
        self.requests: dict[str, Sequence] = {}
        self.expected: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.aborted: set[str] = set()
        self.had: Counter[str] = Counter()  # leading tokens of each request whose KV it once had
        self.had_again = self.partial = self.mixed = 0
        self.ledger = TokenLedger()
        self.asked_before = getattr(getattr(self.engine.scheduler, "forecast", None), "asked", 0)
        self.started: set[str] = set()
        start, plan_step = self.engine.scheduler._start, self.engine.scheduler.schedule
        self.engine.scheduler._start = lambda plan, seq, num_tokens: (  # type: ignore[method-assign]
            start(plan, seq, num_tokens) and self._start_seen(seq)
        )
        self.engine.scheduler.schedule = lambda: self._seen(plan_step())  # type: ignore[method-assign]

    def _start_seen(self, seq: Sequence) -> bool:
        looked_up = len(seq.token_ids) if self.shape.prefix_cache else 0
        self.ledger.admit(seq.request_id, looked_up, found=seq.num_scheduled)
        if seq.request_id not in self.started:
            for request_id, other in self.requests.items():  # by arrival
                if request_id == seq.request_id:
                    break
                waits = request_id not in self.started | self.finished | self.aborted
                assert not (waits and _equal(other, seq)), (
                    f"{seq.request_id} starts before {request_id}, which is equal and arrived earlier"
                )
            self.started.add(seq.request_id)
        return True

    def _seen(self, plan: StepPlan | None) -> StepPlan | None:
        if plan is not None:
            for seq, start, length in zip(
                self.engine.scheduler.in_flight[-1][1], plan.starts, plan.query_lens, strict=True
            ):
                self.ledger.compute(seq.request_id, start, length)
                had, end = self.had[seq.request_id], start + length
                self.had_again += max(0, min(had, end) - start)
                self.had[seq.request_id] = max(had, end)
            self._check_plan(plan)
        return plan

    def _check_plan(self, plan: StepPlan) -> None:
        """A step keeps to its budget, and says of itself what its requests say."""
        seqs = self.engine.scheduler.in_flight[-1][1]
        budget = self.shape.max_num_batched_tokens
        assert sum(plan.query_lens) <= budget, f"{sum(plan.query_lens)} tokens, at most {budget}"
        drawn = [
            seq.params
            for seq, samples in zip(seqs, plan.samples, strict=True)
            if samples and seq.params.temperature > 0
        ]
        assert plan.greedy_only == (not drawn), "what is greedy is sampled, or the other way round"
        assert plan.filtered == any(p.top_k > 0 or p.top_p < 1 for p in drawn), "filters are lost"
        self.partial += plan.samples.count(False)
        self.mixed += 0 < plan.num_decodes < len(seqs)
        counted = self.engine.stats.partial_prefills, self.engine.stats.mixed_steps
        assert counted == (self.partial, self.mixed), (
            f"chunks and mixed steps are counted as {counted}, it was {self.partial}, {self.mixed}"
        )

    def add(self, prompt: tuple[int, ...], max_tokens: int, stops: frozenset[int]) -> bool:
        """False where it is refused, which must be for the reason that the pool cannot hold it."""
        seq = Sequence(
            str(len(self.requests)),
            list(prompt),
            SamplingParams(max_tokens=max_tokens, **SAMPLINGS[sum(prompt) % len(SAMPLINGS)]),
            stop_token_ids=stops,
        )
        fits = -(-(len(prompt) + max_tokens) // self.shape.block_size) <= self.shape.num_blocks
        try:
            self.engine.scheduler.add(seq)
        except ValueError as error:
            assert not fits, f"a request that fits is refused: {error}"
            return False
        assert fits, "a request that can never run is taken"
        self.requests[seq.request_id] = seq
        self.expected[seq.request_id] = oracle(list(prompt), max_tokens, stops)
        return True

    def abort(self, request_id: str) -> None:
        running = request_id not in self.finished | self.aborted
        aborted = self.engine.scheduler.abort(request_id)
        assert (aborted is not None) == running, (
            f"abort of {request_id}, which {'runs' if running else 'has ended'}: {aborted}"
        )
        if aborted is not None:
            self.aborted.add(request_id)
        self.check()

    def step(self) -> None:
        for seq in self.engine.step():
            if seq.finish_reason is not None:
                assert seq.request_id not in self.finished | self.aborted, (
                    f"{seq.request_id} ends twice"
                )
                self.finished.add(seq.request_id)
        self.check()

    def finish(self) -> None:
        """Everything ends within a bound, nothing is lost, every block comes back."""
        total = sum(seq.num_prompt_tokens + seq.params.max_tokens for seq in self.requests.values())
        for _ in range(50 + 20 * total):
            if not self.engine.busy:
                break
            self.step()
        assert not self.engine.busy, "requests starve"
        assert self.finished == set(self.requests) - self.aborted, "a request was lost"
        for request_id in self.finished:
            assert self.requests[request_id].output_token_ids == self.expected[request_id], (
                f"{request_id} ended too early"
            )
        assert self.engine.scheduler.blocks.num_free == self.shape.num_blocks, "blocks were lost"
        if not self.aborted and not any(seq.stop_token_ids for seq in self.requests.values()):
            assert self.engine.stats.discarded_tokens == 0, (
                "a token was computed that nobody asked for"
            )
        self._check_counters()

    def _check_counters(self) -> None:
        stats = self.engine.stats
        hits = sum(seq.num_cached_tokens for seq in self.requests.values())
        assert stats.prefix_hit_tokens == hits, (
            f"{stats.prefix_hit_tokens} hits are counted, requests tell of {hits}"
        )
        again, counted = self.had_again, stats.recomputed_tokens
        if not self.aborted:  # what is aborted does not compute all that it was going to
            # The prefix cache may hold more of a request's first life than its second got to.
            right = again <= counted if self.shape.prefix_cache else again == counted
            assert right, f"{counted} recomputed tokens are counted, it was {again}"
            asked = sum(
                seq.num_prompt_tokens + seq.num_output_tokens - 1 for seq in self.requests.values()
            )
            self.ledger.close(asked, stats)

    def check(self) -> None:
        scheduler = self.engine.scheduler
        check_invariants(scheduler)
        self.ledger.check(self.engine.stats)
        ended = [self.requests[request_id] for request_id in self.finished]
        check_forecast(scheduler, self.asked_before, ended)
        queued = {*scheduler.waiting, *scheduler.prefilling, *scheduler.decoding}
        assert queued == set(self.requests) - self.finished - self.aborted, (
            "a request was lost, or came back"
        )
        for request_id, seq in self.requests.items():
            if request_id in queued:
                self._check_tokens(request_id, seq)
        if isinstance(scheduler.blocks, CachingBlockManager):
            for block, entry in scheduler.blocks.cache.by_block.items():
                self._check_content(block, entry)

    def _check_tokens(self, request_id: str, seq: Sequence) -> None:
        expected = self.expected[request_id][: seq.num_output_tokens]
        assert seq.output_token_ids == expected, (
            f"{request_id} got {seq.output_token_ids}, alone it gets {expected}"
        )

    def _check_content(self, block: int, entry: CachedBlock) -> None:
        chain: list[CachedBlock] = []
        at: Any = entry
        while at is not None:
            chain.append(at)
            at = at.parent
        tokens = tuple(
            token for link in reversed(chain) for token in memoryview(link.tokens).cast("i")
        )
        size = self.shape.block_size
        assert len(entry.tokens) == 4 * size, f"block {block} is findable and not full"
        assert self.engine.runner.memory[block] == list(numbers_of(tokens)[-size:]), (
            f"block {block} is findable under tokens whose KV it does not hold"
        )


def _equal(a: Sequence, b: Sequence) -> bool:
    return (
        a.token_ids[: a.num_prompt_tokens] == b.token_ids[: b.num_prompt_tokens]
        and a.params == b.params
        and a.stop_token_ids == b.stop_token_ids
    )


class TokenLedger:
    """Where the KV of each request came from, seen from outside: computed in a step, found in the
    prefix cache, or computed again after a preemption. The engine's counters must say the same.
    """

    def __init__(self) -> None:
        self.reached: Counter[str] = (
            Counter()
        )  # leading tokens with KV, in its present life or last
        self.extents = 0  # of all lives
        self.computed = self.hits = self.refound = self.recomputed = self.surplus = 0
        self.looked_up = 0

    def admit(self, request_id: str, looked_up: int, found: int) -> None:
        lost = self.reached[request_id]
        if lost:
            self.refound += found
        else:
            self.looked_up += looked_up
            self.hits += found
        self.recomputed += max(0, lost - found)
        # others may have cached more of its text meanwhile than it had
        self.surplus += max(0, found - lost) if lost else 0
        self.extents += found
        self.reached[request_id] = found

    def compute(self, request_id: str, start: int, length: int) -> None:
        assert start == self.reached[request_id], (
            f"{request_id} has the KV of {self.reached[request_id]} tokens and computes from {start}"
        )
        self.reached[request_id] += length
        self.extents += length
        self.computed += length

    def check(self, stats: StepStats) -> None:
        """After every step: what is counted is what was seen, to the token."""
        counted = {
            "computed": stats.prefill_tokens + stats.decode_tokens,
            "found by a new request": stats.prefix_hit_tokens,
            "found by a preempted one": stats.prefix_refound_tokens,
            "recomputed": stats.recomputed_tokens,
            "looked up": stats.prefix_lookup_tokens,
        }
        seen = {
            "computed": self.computed,
            "found by a new request": self.hits,
            "found by a preempted one": self.refound,
            "recomputed": self.recomputed,
            "looked up": self.looked_up,
        }
        assert counted == seen, f"tokens are counted as {counted}, it was {seen}"
        assert self.extents == self.computed + self.hits + self.refound

    def close(self, asked: int, stats: StepStats) -> None:
        """At the end, if nothing was aborted: each token that was asked for was computed or found
        once, and beyond that is only what was discarded or computed again. asked: prompts and
        outputs, except for the last token of each, whose KV nobody needs.
        """
        fresh = stats.prefill_tokens + stats.decode_tokens - stats.recomputed_tokens
        found = stats.prefix_hit_tokens + self.surplus
        assert fresh + found == asked + stats.discarded_tokens, (
            f"{asked} tokens were asked for and {stats.discarded_tokens} discarded; "
            f"{fresh} were computed and {found} found"
        )


class EngineMachine(RuleBasedStateMachine):
    """Requests arrive, alone or several in one step, are aborted and served, in any order."""

    engine_type: type[CheckedEngine] = CheckedEngine

    @initialize(shape=shapes(lags=(0, 1, 1, 2)))
    def start(self, shape: Shape) -> None:
        self.checked = self.engine_type(shape)
        self.prompts: list[tuple[int, ...]] = []

    @rule(data=st.data(), count=st.sampled_from([1, 1, 2, 3]), again=st.booleans())
    def add(self, data: st.DataObject, count: int, again: bool) -> None:
        """Several at once; `again`: they all have one prompt, so that equal prompts meet in one
        step.
        """
        prompt: tuple[int, ...] = ()
        for _ in range(count):
            if not (prompt and again):
                prompt = data.draw(
                    prompts(self.prompts, VOCAB, self.checked.shape.block_size, LONGEST_PROMPT)
                )
            ending = data.draw(endings(VOCAB, LONGEST_OUTPUT))
            if self.checked.add(prompt, ending["max_tokens"], frozenset(ending["stop_token_ids"])):
                self.prompts.append(prompt)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Any that ever came, so one that has ended as well."""
        if self.checked.requests:
            self.checked.abort(data.draw(st.sampled_from(sorted(self.checked.requests))))

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.checked.step()

    def teardown(self) -> None:
        if hasattr(self, "checked"):
            self.checked.finish()
