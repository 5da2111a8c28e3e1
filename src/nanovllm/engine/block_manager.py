"""Who owns which block of the KV cache. No torch.

    blank      no owner, holds nothing worth keeping        taken first
    evictable  no owner, but the prefix cache knows it      taken next, least recently released first
    owned      reference count > 0

Every block is in exactly one of the three. Allocation, sharing and release cost O(blocks named).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.prefix_cache import PrefixCache


class BlockManager:
    """num_blocks blocks of block_size tokens. With a prefix cache, released blocks stay findable until they are needed."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: PrefixCache | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.ref_counts = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one owner each. Raises ValueError when fewer are free: the caller asks num_free first."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free")
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                assert self.prefix_cache is not None
                self.prefix_cache.evict(block)
            self.ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for blocks that the prefix cache found."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._evictable[block]
            self.ref_counts[block] += 1

    def num_unowned(self, blocks: Iterable[int]) -> int:
        """How many of these would leave the free pool if they were shared."""
        return sum(self.ref_counts[block] == 0 for block in blocks)

    def release(self, blocks: list[int]) -> None:
        """One owner less. Released from the end, so that a prefix outlives what follows it."""
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if self.prefix_cache is not None and block in self.prefix_cache:
                    self._evictable[block] = None
                else:
                    self._blank.append(block)

    def forget_prefixes(self) -> None:
        """Empties the prefix cache of what no request holds."""
        while self._evictable:
            block, _ = self._evictable.popitem(last=False)
            assert self.prefix_cache is not None
            self.prefix_cache.evict(block)
            self._blank.append(block)

    def check_invariants(self, block_tables: Iterable[list[int]]) -> None:
        """Raises AssertionError unless every block is in one place and its count equals its owners in `block_tables`."""
        owners = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), f"a table names a block twice: {table}"
            for block in table:
                owners[block] += 1
        assert owners == self.ref_counts, "reference counts differ from the owners"
        free = [*self._blank, *self._evictable]
        assert len(set(free)) == len(free), "a block is free twice"
        assert {b for b in range(self.num_blocks) if owners[b] == 0} == set(free), "free and owned do not add up"
        if self.prefix_cache is not None:
            self.prefix_cache.check_invariants()
            assert all(block in self.prefix_cache for block in self._evictable), "an evictable block is not cached"
            assert not any(block in self.prefix_cache for block in self._blank), "a blank block is cached"
