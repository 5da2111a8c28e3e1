"""The tests are tested: each bad implementation below is one small patch of a real function, and the property must catch it.

More of them, over the whole engine, belong here: a mistake that engines of this kind have made is worth a patch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.prefix_cache import CachedBlock, CachingBlockManager, PrefixCache
from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence
from property_tests.test_scheduler_properties import EngineMachine

Patch = tuple[type, str, Callable[..., Any]]


def fully_cached_prompt_has_nothing_to_compute() -> Patch:
    def match(self: PrefixCache, token_ids: list[int]) -> list[CachedBlock]:
        return real(self, [*token_ids, -1])  # one token longer: every block of the prompt may be a hit

    real = PrefixCache.match
    return PrefixCache, "match", match


def blocks_are_found_before_they_are_computed() -> Patch:
    def claim(self: CachingBlockManager, seq: Sequence, num_tokens: int) -> bool:
        claimed = real(self, seq, num_tokens)
        if claimed:
            self.publish(seq, len(seq.token_ids))
        return claimed

    real = CachingBlockManager.claim
    return CachingBlockManager, "claim", claim


def the_parent_is_not_part_of_the_key() -> Patch:
    def match(self: PrefixCache, token_ids: list[int]) -> list[CachedBlock]:
        hits = []
        for i in range((len(token_ids) - 1) // self.block_size):
            tokens = self._tokens(token_ids, i)
            found = next((entry for entry in self.by_block.values() if entry.tokens == tokens), None)
            if found is None or found in hits:
                break
            hits.append(found)
        return hits

    return PrefixCache, "match", match


def a_reused_block_is_still_found() -> Patch:
    def evict(self: PrefixCache, block: int) -> None:
        self.by_block.pop(block)

    return PrefixCache, "evict", evict


def a_collision_is_served() -> Patch:
    def match(self: PrefixCache, token_ids: list[int]) -> list[CachedBlock]:
        hits: list[CachedBlock] = []
        for i in range((len(token_ids) - 1) // self.block_size):
            found = next(
                (e for e in self.by_block.values() if sum(array("i", e.tokens)) == sum(array("i", self._tokens(token_ids, i)))),
                None,
            )
            if found is None or found in hits:
                break
            hits.append(found)
        return hits

    return PrefixCache, "match", match


def a_live_block_is_evicted() -> Patch:
    def share(self: CachingBlockManager, blocks: list[int]) -> None:
        for block in blocks:
            self.ref_counts[block] += 1

    return CachingBlockManager, "share", share


def a_reference_is_not_dropped() -> Patch:
    def release(self: CachingBlockManager, blocks: list[int]) -> None:
        real(self, blocks[:-1])

    real = CachingBlockManager.release
    return CachingBlockManager, "release", release


def a_block_is_released_twice() -> Patch:
    def release(self: BlockManager, blocks: list[int]) -> None:
        self.blank += [*blocks, *blocks[:1]]

    return BlockManager, "release", release


def the_resumed_position_is_kept() -> Patch:
    def leave(self: Scheduler, seq: Sequence, queue: Any) -> None:
        scheduled = seq.num_scheduled
        real(self, seq, queue)
        seq.num_scheduled = scheduled

    real = Scheduler._leave
    return Scheduler, "_leave", leave


def the_sampled_token_is_lost_at_preemption() -> Patch:
    def leave(self: Scheduler, seq: Sequence, queue: Any) -> None:
        if seq.finish_reason is None and seq.num_output_tokens:
            seq.token_ids.pop()
        real(self, seq, queue)

    real = Scheduler._leave
    return Scheduler, "_leave", leave


def the_oldest_is_preempted() -> Patch:
    def grow(self: ContinuousScheduler, plan: StepPlan, seq: Sequence) -> bool:
        while self.blocks.num_free == 0:
            victim = next(iter(self.decoding.values()))
            self._leave(victim, self.decoding)
            self.waiting[victim.request_id] = victim  # at the end of the queue: it may starve
            if victim is seq:
                return False
        return real(self, plan, seq)

    real = ContinuousScheduler._grow
    return ContinuousScheduler, "_grow", grow


def a_resumed_request_does_not_wait_for_its_own_token() -> Patch:
    def admit(self: ContinuousScheduler, plan: StepPlan) -> None:
        flights = {seq.request_id: seq.in_flight for seq in self.waiting.values()}
        for seq in self.waiting.values():
            seq.in_flight = 0
        waiting = list(self.waiting.values())
        real(self, plan)
        for seq in waiting:
            seq.in_flight += flights[seq.request_id]

    real = ContinuousScheduler._admit
    return ContinuousScheduler, "_admit", admit


def a_stop_token_does_not_stop() -> Patch:
    def append(self: Sequence, token_id: int) -> bool:
        stops, self.stop_token_ids = self.stop_token_ids, frozenset()
        ended = real(self, token_id)
        self.stop_token_ids = stops
        return ended

    real = Sequence.append
    return Sequence, "append", append


def max_tokens_is_passed_by_one() -> Patch:
    return Sequence, "wants_more", property(lambda self: self.num_output_tokens + self.pending <= self.params.max_tokens)  # type: ignore[return-value]


def a_block_is_allocated_one_token_late() -> Patch:
    def blocks_for(self: BlockManager, num_tokens: int) -> int:
        return max(1, -(-(num_tokens - 1) // self.block_size))

    return BlockManager, "blocks_for", blocks_for


def a_chunk_publishes_the_next_block_as_well() -> Patch:
    def publish(self: CachingBlockManager, seq: Sequence, num_computed: int) -> None:
        real(self, seq, min(num_computed + self.block_size, len(seq.token_ids)))

    real = CachingBlockManager.publish
    return CachingBlockManager, "publish", publish


BAD = [
    fully_cached_prompt_has_nothing_to_compute, blocks_are_found_before_they_are_computed, the_parent_is_not_part_of_the_key,
    a_reused_block_is_still_found, a_collision_is_served, a_live_block_is_evicted, a_reference_is_not_dropped,
    a_block_is_released_twice, the_resumed_position_is_kept, the_sampled_token_is_lost_at_preemption, the_oldest_is_preempted,
    a_resumed_request_does_not_wait_for_its_own_token, a_stop_token_does_not_stop, max_tokens_is_passed_by_one,
    a_block_is_allocated_one_token_late, a_chunk_publishes_the_next_block_as_well,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_bad_implementation_dies(bad: Callable[[], Patch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*bad())
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError, StopIteration, RuntimeError)) as caught:
        run_state_machine_as_test(
            EngineMachine,
            settings=settings(
                max_examples=1500,
                stateful_step_count=30,
                deadline=None,
                database=None,
                derandomize=True,
                print_blob=False,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            ),
        )
    print(f"{bad.__name__}: killed by {caught.type.__name__}: {str(caught.value).splitlines()[0] if str(caught.value) else ''}")
