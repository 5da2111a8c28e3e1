"""What must hold for scheduler and blocks between any two calls. For tests; a run does not load it."""

from collections import Counter

from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.scheduler import Scheduler


def check_invariants(scheduler: Scheduler) -> None:
    """Raises AssertionError where queues, rows, blocks and the prefix cache contradict each other."""
    _check_requests(scheduler)
    _check_blocks(scheduler)
    if isinstance(scheduler.blocks, CachingBlockManager):
        _check_prefixes(scheduler.blocks)


def _check_requests(scheduler: Scheduler) -> None:
    running = [*scheduler.decoding.values(), *scheduler.prefilling.values()]
    queued = [*scheduler.waiting.values(), *running]
    assert len({seq.request_id for seq in queued}) == len(queued), "a request is in two queues"
    rows = [seq.row for seq in running]
    assert sorted(rows + scheduler.free_rows) == list(range(scheduler.config.max_num_seqs)), (
        "rows lost or used twice"
    )
    for seq in scheduler.waiting.values():
        assert seq.row == -1, f"{seq.request_id} waits and has a row"
        assert not seq.block_table, f"{seq.request_id} waits and owns blocks"
        assert seq.num_scheduled == 0, f"{seq.request_id} waits and counts tokens as computed"
    for seq in queued:
        assert seq.finish_reason is None, f"{seq.request_id} has ended and is queued"
        assert 0 <= seq.pending <= seq.in_flight, (
            f"{seq.request_id}: pending {seq.pending}, in flight {seq.in_flight}"
        )
        capacity = len(seq.block_table) * scheduler.blocks.block_size
        assert seq.num_scheduled <= capacity, f"{seq.request_id} writes past its blocks"
        assert seq.num_to_schedule >= 0, f"{seq.request_id} computes unknown tokens"


def _check_blocks(scheduler: Scheduler) -> None:
    """Free + owned = all; a block has one owner, or as many as its reference count says."""
    manager = scheduler.blocks
    tables = [
        seq.block_table for seq in (*scheduler.decoding.values(), *scheduler.prefilling.values())
    ]
    for table in tables:
        assert len(set(table)) == len(table), f"a table names a block twice: {table}"
    owners = Counter(block for table in tables for block in table)
    free = list(manager.blank)
    if isinstance(manager, CachingBlockManager):
        free += manager.evictable
        assert {b: n for b, n in enumerate(manager.ref_counts) if n} == dict(owners), (
            "reference counts differ from the owners"
        )
    else:
        assert not owners or max(owners.values()) == 1, "a block has two owners"
    assert len(set(free)) == len(free), "a block is free twice"
    assert not set(free) & set(owners), "a block is free and owned"
    assert len(free) + len(owners) == manager.num_blocks, "free and owned do not add up"


def _check_prefixes(manager: CachingBlockManager) -> None:
    cache = manager.cache
    assert len(cache.by_key) == len(cache.by_block), "an entry is in one map only"
    for block, entry in cache.by_block.items():
        assert entry.block == block, f"block {block} is listed with the entry of {entry.block}"
        assert cache.by_key.get(entry.key) is entry, f"block {block} cannot be found by its key"
    assert all(block in cache for block in manager.evictable), "an evictable block is not findable"
    assert not any(block in cache for block in manager.blank), "a blank block is findable"
