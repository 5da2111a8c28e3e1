"""Hits, evictions, and that a collision or a stale entry is never served."""

from __future__ import annotations

import pytest

from nanovllm.engine.prefix_cache import CachedBlock, CachingBlockManager, PrefixCache
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import SamplingParams


def cache_of(blocks: int = 8, block_size: int = 2) -> tuple[PrefixCache, CachingBlockManager]:
    manager = CachingBlockManager(blocks, block_size, StepStats())
    return manager.cache, manager


def fill(cache: PrefixCache, manager: CachingBlockManager, tokens: list[int]) -> list[int]:
    """Computes and publishes every full block of `tokens`."""
    table = manager.allocate(manager.blocks_for(len(tokens)))
    parent: CachedBlock | None = None
    for i in range(len(tokens) // cache.block_size):
        parent = cache.insert(table[i], tokens, i, parent)
    return table


def test_the_longest_prefix_is_found_and_one_token_is_left_to_compute() -> None:
    cache, manager = cache_of()
    table = fill(cache, manager, [1, 2, 3, 4, 5])
    assert [hit.block for hit in cache.match([1, 2, 3, 4, 9])] == table[:2]
    # the last token has logits to compute
    assert [hit.block for hit in cache.match([1, 2, 3, 4])] == table[:1]
    assert [hit.block for hit in cache.match([1, 2, 9, 4, 5])] == table[:1]
    assert cache.match([9, 2, 3, 4, 5]) == []


def test_the_same_tokens_after_another_prefix_are_another_block() -> None:
    cache, manager = cache_of()
    fill(cache, manager, [1, 2, 7, 7])
    other = fill(cache, manager, [3, 4, 7, 7])
    assert [hit.block for hit in cache.match([3, 4, 7, 7, 0])] == other


def test_a_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "_key", lambda self, parent, tokens: 42)
    cache, manager = cache_of()
    table = fill(cache, manager, [1, 2])
    assert [hit.block for hit in cache.match([1, 2, 3])] == table
    assert cache.match([3, 4, 5]) == []
    # the place is taken: not cached, never mixed up
    assert cache.insert(7, [3, 4], 0, None) is None
    assert len(cache.by_key) == len(cache.by_block) == 1


def test_a_collision_of_the_second_block_checks_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "_key", lambda self, parent, tokens: hash(tokens))
    cache, manager = cache_of()
    fill(cache, manager, [1, 2, 7, 7])
    fill(cache, manager, [3, 4])
    assert len(cache.match([3, 4, 7, 7, 0])) == 1


def test_evicted_least_recently_released_first_and_a_prefix_outlives_its_end() -> None:
    cache, manager = cache_of(blocks=4)
    first, second = fill(cache, manager, [1, 2, 3, 4]), fill(cache, manager, [5, 6, 7, 8])
    manager.release(first)
    manager.release(second)
    manager.allocate(1)
    assert [hit.block for hit in cache.match([1, 2, 3, 4, 0])] == first[:1]
    assert len(cache.match([5, 6, 7, 8, 0])) == 2
    manager.allocate(1)
    assert cache.match([1, 2, 3, 4, 0]) == []
    assert manager.stats.prefix_evictions == 2


def test_the_end_of_a_prefix_is_found_again_when_its_evicted_beginning_returns() -> None:
    """Two compute one prefix at once; the copy of its beginning that is findable goes, the other's
    end stays.
    """
    cache, manager = cache_of(blocks=6)
    first = fill(cache, manager, [1, 2])
    longer = manager.allocate(3)
    parent = None
    for i, block in enumerate(longer):
        parent = cache.insert(block, [1, 2, 3, 4, 5, 6], i, parent)
    manager.release(first)
    manager.release(manager.allocate(3))  # the pool needs the block that can be found
    assert cache.match([1, 2, 3, 4, 5, 6, 0]) == []
    again = fill(cache, manager, [1, 2])
    assert cache.insert(9, [1, 2, 3, 4], 1, cache.match([1, 2, 0])[-1]) is not None
    assert [hit.block for hit in cache.match([1, 2, 3, 4, 5, 6, 0])] == [*again, *longer[1:]]


def test_a_shared_block_is_not_evicted() -> None:
    cache, manager = cache_of(blocks=2)
    table = fill(cache, manager, [1, 2])
    manager.release(table)
    manager.share([hit.block for hit in cache.match([1, 2, 3])])
    assert manager.num_free == 1
    assert manager.allocate(1) != table
    with pytest.raises(ValueError, match="0 of 2 are free"):
        manager.allocate(1)


def test_forgetting_keeps_what_is_owned() -> None:
    cache, manager = cache_of()
    kept, dropped = fill(cache, manager, [1, 2]), fill(cache, manager, [3, 4])
    manager.release(dropped)
    manager.forget_prefixes()
    assert len(cache) == 1
    manager.release(kept)
    assert manager.num_free == manager.num_blocks


def test_nothing_is_cached_after_a_block_that_was_evicted() -> None:
    cache, manager = cache_of()
    table = fill(cache, manager, [1, 2])
    (parent,) = cache.match([1, 2, 3])
    cache.evict(table[0])
    assert cache.insert(5, [1, 2, 3, 4], 1, parent) is None
    assert cache.insert(5, [1, 2, 3, 4], 1, None) is None
    assert len(cache) == 0


def test_a_chain_that_has_ended_is_not_continued() -> None:
    _, manager = cache_of()
    seq = Sequence("a", [1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=1))
    seq.block_table, seq.num_published = manager.allocate(3), 1
    seq.published_tail = CachedBlock(-1, 7, None, b"")  # was evicted
    manager.publish(seq, 6)
    assert seq.num_published == -1
    assert len(manager.cache) == 0


def test_a_request_waits_for_what_follows_its_hits() -> None:
    """Keys of the blocks that are being computed begin at the last block that was found."""
    _, manager = cache_of(blocks=12)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    table = fill(manager.cache, manager, prompt[:4])
    manager.release(table)
    first, second = (Sequence(name, list(prompt), SamplingParams(max_tokens=1)) for name in "ab")
    assert manager.claim(first, 11)
    assert first.num_scheduled == 4
    coming = manager.coming([first])
    assert len(coming) == 3
    assert manager.had_better_wait(second, coming)
    assert not manager.had_better_wait(second, set())
