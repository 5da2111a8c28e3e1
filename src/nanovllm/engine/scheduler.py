"""Decides what each step computes. No torch, no I/O: requests in, StepPlans out, sampled tokens
back in.

    waiting --admit--> prefilling --whole prompt planned--> decoding --commit--> finished
       ^                   |                                   |
       +------------- preempt (last admitted first) -----------+

There are two phases: *prefill* computes the KV of known tokens (a prompt, or everything again after a
preemption), *decode* computes one new token per request. Who is admitted and what a step mixes is the
batching policy. This file has the baseline:

    static      admit a batch with the KV of its longest possible outputs reserved; admit no more until all have finished

continuous_batching.py has the others, which admit whenever there is room and preempt when it runs out.

Planning costs O(requests in the step). A request is in exactly one of three queues. All three are ordered by
age, and every prefilling request is younger than every decoding one.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from nanovllm.config import ResolvedConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, TokenLogprobs
from nanovllm.engine.stats import StepStats


@dataclass(slots=True)
class StepPlan:
    """One step as flat lists: what the runner of every rank receives. Decodes come first and read
    their token on the device.

    Entry i computes query_lens[i] tokens of row rows[i], starting at position starts[i]; where
    samples[i], its last token yields a new one. token_ids holds the tokens of the prefill entries,
    one entry after the other.
    """

    step: int
    num_decodes: int = 0
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    # (row, index in its table, block)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    # (row, temperature, top_k, top_p, seed, processors)
    new_rows: list[tuple[int, float, int, float, int, object]] = field(default_factory=list)
    greedy_only: bool = True
    filtered: bool = False  # top-k or top-p is used
    num_logprobs: int | None = None  # the most that any sampling entry asks for


class Scheduler:
    """Owns the queues and the KV blocks. `schedule` may be one step ahead of `commit` (overlap)."""

    def __init__(self, config: ResolvedConfig, blocks: BlockManager, stats: StepStats) -> None:
        self.config, self.blocks, self.stats = config, blocks, stats
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.prefilling: OrderedDict[str, Sequence] = OrderedDict()
        self.decoding: OrderedDict[str, Sequence] = OrderedDict()
        self.free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()  # planned, not committed

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def add(self, seq: Sequence) -> None:
        """Queues a request. Raises ValueError if it can never run: its id is in use, or it needs
        more than the whole KV cache.
        """
        if any(seq.request_id in queue for queue in (self.waiting, self.prefilling, self.decoding)):
            raise ValueError(
                f"request_id {seq.request_id!r} is already in use by an unfinished request"
            )
        longest = seq.num_prompt_tokens + seq.params.max_tokens
        needed = self.blocks.blocks_for(longest)
        if needed > self.blocks.num_blocks:
            raise ValueError(
                f"request {seq.request_id!r} needs {needed} KV blocks for {longest} tokens, the cache has "
                f"{self.blocks.num_blocks} of {self.blocks.block_size} tokens: shorten it, or enlarge the cache"
            )
        self.waiting[seq.request_id] = seq

    def abort(self, request_id: str) -> Sequence | None:
        """Ends a request now; None if no such request is unfinished. Its tokens in flight are
        discarded.
        """
        for queue in (self.waiting, self.prefilling, self.decoding):
            if (seq := queue.get(request_id)) is not None:
                seq.finish_reason = "abort"
                self._leave(seq, queue)
                return seq
        return None

    # -- planning ----------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step; None when nothing can be planned before an earlier step is committed, or
        nothing is left to do.
        """
        plan = StepPlan(self.stats.steps)
        seqs: list[Sequence] = []
        self._admit(plan)
        self._fill(plan, seqs)
        if not seqs:
            return None
        self.in_flight.append((plan, seqs))
        self.stats.steps += 1
        self.stats.policy_steps[self.config.optimizations.batching] += 1
        self.stats.prefill_tokens += len(plan.token_ids)
        self.stats.decode_tokens += plan.num_decodes
        self.stats.mixed_steps += 0 < plan.num_decodes < len(seqs)
        return plan

    def _admit(self, plan: StepPlan) -> None:
        """Moves requests from waiting to prefilling, oldest first, while there are rows and blocks."""
        while not self.decoding and self.waiting and self.free_rows:
            seq = next(iter(self.waiting.values()))
            if not self._start(plan, seq, seq.num_prompt_tokens + seq.params.max_tokens):
                break

    def _fill(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        """A step is all prefill while anything is left to prefill, else all decode."""
        self._plan_prefills(plan, seqs)
        if not seqs:
            self._plan_decodes(plan, seqs)

    def _start(self, plan: StepPlan, seq: Sequence, num_tokens: int) -> bool:
        """Gives a waiting request a row, and blocks for num_tokens tokens; False where too few
        blocks are free.
        """
        if not self.blocks.claim(seq, num_tokens):
            return False
        del self.waiting[seq.request_id]
        self.prefilling[seq.request_id] = seq
        seq.row = self.free_rows.pop()
        plan.new_rows.append(
            (
                seq.row,
                seq.params.temperature,
                seq.params.top_k,
                seq.params.top_p,
                seq.seed,
                seq.processors,
            )
        )
        plan.new_blocks += [(seq.row, i, block) for i, block in enumerate(seq.block_table)]
        self.stats.admissions += 1
        return True

    def _plan_prefills(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        budget = self.config.max_num_batched_tokens - plan.num_decodes
        while budget > 0 and self.prefilling:
            seq = next(iter(self.prefilling.values()))
            start, remaining = seq.num_scheduled, seq.num_to_schedule
            length = min(remaining, budget)
            budget -= length
            self._plan_entry(plan, seqs, seq, length, samples=length == remaining)
            plan.token_ids += seq.token_ids[start : start + length]
            if length < remaining:
                self.stats.partial_prefills += 1
                break
            del self.prefilling[seq.request_id]
            self.decoding[seq.request_id] = seq

    def _plan_decodes(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        for seq in self.decoding.values():
            if seq.wants_more:  # otherwise its last token is in flight
                self._plan_entry(plan, seqs, seq, 1, samples=True)
        plan.num_decodes = len(seqs)

    def _plan_entry(
        self, plan: StepPlan, seqs: list[Sequence], seq: Sequence, length: int, *, samples: bool
    ) -> None:
        plan.rows.append(seq.row)
        plan.starts.append(seq.num_scheduled)
        plan.query_lens.append(length)
        plan.samples.append(samples)
        seqs.append(seq)
        seq.num_scheduled += length
        seq.in_flight += 1
        if samples:
            seq.pending += 1
            if seq.params.temperature > 0:
                plan.greedy_only = False
                plan.filtered |= seq.params.top_k > 0 or seq.params.top_p < 1
            if seq.params.logprobs is not None:
                plan.num_logprobs = max(plan.num_logprobs or 0, seq.params.logprobs)

    def _leave(self, seq: Sequence, queue: OrderedDict[str, Sequence]) -> None:
        """Takes a request's row and blocks back. Steps in flight may still write to them: their
        next owner is planned later.
        """
        del queue[seq.request_id]
        if seq.row >= 0:
            self.free_rows.append(seq.row)
            self.blocks.release(seq.block_table)
        seq.row, seq.block_table, seq.published_tail = -1, [], None
        seq.num_scheduled = seq.num_published = 0

    # -- committing --------------------------------------------------------------------------------

    def commit(
        self, plan: StepPlan, tokens: list[int], logprobs: list[TokenLogprobs] | None = None
    ) -> list[Sequence]:
        """Takes the sampled tokens of the oldest plan in flight, one per entry that samples: appends
        them, makes full blocks findable, stops and releases. Returns the sequences that got a
        token; finished ones have a finish_reason.

        Raises ValueError where the plan is not the oldest one, or the number of tokens is wrong.
        """
        oldest, seqs = self.in_flight.popleft()
        if oldest is not plan:
            raise ValueError(
                f"step {plan.step} committed, the oldest step in flight is {oldest.step}"
            )
        if len(tokens) != sum(plan.samples):
            raise ValueError(
                f"step {plan.step} samples {sum(plan.samples)} tokens, {len(tokens)} were committed"
            )
        advanced = []
        results = iter(zip(tokens, logprobs or [None] * len(tokens), strict=True))  # type: ignore[list-item]
        for i, (seq, samples) in enumerate(zip(seqs, plan.samples, strict=True)):
            token, chosen = next(results) if samples else (-1, None)
            seq.in_flight -= 1
            seq.pending -= int(samples)
            if seq.finish_reason is not None:
                self.stats.discarded_tokens += int(samples)
                continue
            if seq.row == plan.rows[i]:  # not preempted meanwhile
                self.blocks.publish(seq, plan.starts[i] + plan.query_lens[i])
            if samples:
                advanced.append(seq)
                if seq.params.logprobs is not None and chosen is not None:
                    seq.logprobs.append(chosen)
                if seq.append(token):
                    self._leave(seq, self.decoding if seq.row >= 0 else self.waiting)
        return advanced
