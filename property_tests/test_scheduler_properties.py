"""Whatever the policy, the pool, the arrivals, preemption, sharing, aborts and commit lag: every request gets its own tokens."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from property_tests.model_free import VOCAB, ModelFreeEngine, oracle


class EngineMachine(RuleBasedStateMachine):
    """Requests arrive, are aborted and served, in any order; the structure is checked after every step."""

    @initialize(
        batching=st.sampled_from(["static", "continuous", "chunked"]),
        prefix_cache=st.booleans(),
        lag=st.sampled_from([0, 1, 1, 2]),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        num_blocks=st.integers(2, 24),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 24),
    )
    def start(
        self, batching: str, prefix_cache: bool, lag: int, block_size: int, num_blocks: int, max_num_seqs: int, extra_budget: int
    ) -> None:
        self.engine = ModelFreeEngine(
            batching, prefix_cache, lag, block_size, num_blocks, max_num_seqs, max_num_seqs + extra_budget
        )
        self.requests: dict[str, Sequence] = {}
        self.expected: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.prompts: list[list[int]] = [[0]]

    @rule(
        data=st.data(),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 14),
        stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=1),
    )
    def add(self, data: st.DataObject, tokens: list[int], max_tokens: int, stops: frozenset[int]) -> None:
        """A prompt of its own, an earlier one again, or an earlier one continued."""
        prefix = data.draw(st.sampled_from([[], *self.prompts[-4:]]))
        prompt = (prefix + tokens)[:30]
        seq = Sequence(str(len(self.requests)), list(prompt), SamplingParams(max_tokens=max_tokens), stop_token_ids=stops)
        try:
            self.engine.scheduler.add(seq)
        except ValueError:
            assert self.engine.scheduler.blocks.blocks_for(len(prompt) + max_tokens) > self.engine.num_blocks
            return
        self.prompts.append(prompt)
        self.requests[seq.request_id] = seq
        self.expected[seq.request_id] = oracle(prompt, max_tokens, stops)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if self.engine.scheduler.abort(request_id) is not None:
            self.aborted.add(request_id)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            check_invariants(self.engine.scheduler)

    @invariant()
    def tokens_are_those_of_the_oracle(self) -> None:
        for request_id, seq in getattr(self, "requests", {}).items():
            assert seq.output_token_ids == self.expected[request_id][: seq.num_output_tokens]

    def teardown(self) -> None:
        """Everything ends within a bound, nothing is lost, every block comes back."""
        if not hasattr(self, "engine"):
            return
        total = sum(seq.num_prompt_tokens + seq.params.max_tokens for seq in self.requests.values())
        for _ in range(50 + 20 * total):
            if not self.engine.busy:
                break
            self.engine.step()
            check_invariants(self.engine.scheduler)
        assert not self.engine.busy, "requests starve"
        assert set(self.engine.finished) == set(self.requests) - self.aborted
        for request_id in self.engine.finished:
            assert self.requests[request_id].output_token_ids == self.expected[request_id]
        assert self.engine.scheduler.blocks.num_free == self.engine.num_blocks
        if not self.aborted and not any(seq.stop_token_ids for seq in self.requests.values()):
            assert self.engine.stats.discarded_tokens == 0, "a token was computed that nobody asked for"


EngineMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestEngineMachine = EngineMachine.TestCase
