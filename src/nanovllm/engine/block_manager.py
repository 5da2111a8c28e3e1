"""Which request owns which block of the KV cache. No torch.

This is the baseline: a block has one owner or none, and its contents are forgotten when it is
released. With the prefix cache on, prefix_cache.CachingBlockManager takes its place.
"""

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats


class BlockManager:
    """num_blocks blocks of block_size tokens. Every operation costs O(blocks involved)."""

    def __init__(self, num_blocks: int, block_size: int, stats: StepStats) -> None:
        self.num_blocks, self.block_size, self.stats = num_blocks, block_size, stats
        self.blank = list(range(num_blocks - 1, -1, -1))  # no owner, no contents worth keeping

    @property
    def num_free(self) -> int:
        return len(self.blank)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def claim(self, seq: Sequence, num_tokens: int) -> bool:
        """Gives a waiting request blocks for num_tokens tokens; False, with nothing changed, where
        too few are free.
        """
        if (needed := self.blocks_for(num_tokens)) > self.num_free:
            return False
        seq.block_table = self.allocate(needed)
        return True

    def allocate(self, count: int) -> list[int]:
        """`count` blocks without an owner. Raises ValueError where fewer are free: check num_free
        first.
        """
        if count > self.num_free:
            raise ValueError(
                f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free"
            )
        return [self._take() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Frees the blocks of an owner."""
        self.blank += reversed(blocks)

    def publish(self, seq: Sequence, num_computed: int) -> None:
        """Called when the KV of the first num_computed tokens is in the cache. Nothing is shared
        here.
        """

    def forget_prefixes(self) -> None:
        """Forgets cached prefixes that no request uses. Without the prefix cache there are none."""

    def _take(self) -> int:
        return self.blank.pop()
