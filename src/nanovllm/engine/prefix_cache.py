"""prefix_cache=True: blocks that hold the same prefix are shared, and found again later. Loaded
only when on. No torch.

    root <- CachedBlock(tokens 0..15) <- CachedBlock(tokens 16..31) <- ...

A block's key is xxh64(parent's key, its tokens). The key only finds a candidate: a hit is served
after the candidate's tokens, and the identity of its parent, have been compared. By induction over
the chain a hit is the same prefix; a hash collision is a miss.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import takewhile

import xxhash

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats


class CachedBlock:
    """One full block whose KV is computed and may be shared. `block` is -1 once it is evicted."""

    __slots__ = ("block", "key", "parent", "tokens")

    def __init__(self, block: int, key: int, parent: "CachedBlock | None", tokens: bytes) -> None:
        self.block, self.key, self.parent, self.tokens = block, key, parent, tokens


class PrefixCache:
    """Which block holds which prefix. CachingBlockManager owns the blocks and decides what is
    evicted.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.by_key: dict[int, CachedBlock] = {}
        self.by_block: dict[int, CachedBlock] = {}

    def __len__(self) -> int:
        return len(self.by_block)

    def __contains__(self, block: int) -> bool:
        return block in self.by_block

    def match(self, token_ids: SequenceOf[int]) -> list[CachedBlock]:
        """The longest cached prefix, in whole blocks. At least one token is always left over, as
        its logits are needed.
        """
        hits: list[CachedBlock] = []
        parent: CachedBlock | None = None
        for i in range((len(token_ids) - 1) // self.block_size):
            tokens = self._tokens(token_ids, i)
            found = self.by_key.get(self._key(parent, tokens))
            if found is None or found.tokens != tokens or found.parent is not parent:
                break
            hits.append(found)
            parent = found
        return hits

    def insert(
        self, block: int, token_ids: SequenceOf[int], index: int, parent: CachedBlock | None
    ) -> CachedBlock | None:
        """Makes block `index` of this prefix findable once its KV is computed; returns the entry
        that now holds that prefix.

        If an equal prefix is already cached, its entry stays; it is linked to `parent` if its own
        parent was evicted. Returns None, which ends the chain, where the parent was evicted or
        another prefix has the same key.
        """
        if (index > 0 and parent is None) or (parent is not None and parent.block < 0):
            return None
        tokens = self._tokens(token_ids, index)
        key = self._key(parent, tokens)
        present = self.by_key.get(key)
        if present is not None:
            if present.tokens != tokens or not _same_prefix(present.parent, parent):
                return None
            present.parent = parent
            return present
        entry = self.by_key[key] = self.by_block[block] = CachedBlock(block, key, parent, tokens)
        return entry

    def evict(self, block: int) -> None:
        """Forgets what `block` holds, before it gets another owner."""
        entry = self.by_block.pop(block)
        del self.by_key[entry.key]
        entry.block = -1

    def keys(
        self, token_ids: SequenceOf[int], first: int, parent: CachedBlock | None
    ) -> Iterator[int]:
        """Keys of the full blocks from number `first` on, after `parent`, whether cached or not."""
        key = parent.key if parent else 0
        for i in range(first, len(token_ids) // self.block_size):
            key = xxhash.xxh64_intdigest(self._tokens(token_ids, i), seed=key)
            yield key

    def _tokens(self, token_ids: SequenceOf[int], index: int) -> bytes:
        return array(
            "i", token_ids[index * self.block_size : (index + 1) * self.block_size]
        ).tobytes()

    def _key(self, parent: CachedBlock | None, tokens: bytes) -> int:
        return xxhash.xxh64_intdigest(tokens, seed=parent.key if parent else 0)


def _same_prefix(a: CachedBlock | None, b: CachedBlock | None) -> bool:
    while a is not b:
        if a is None or b is None or a.tokens != b.tokens:
            return False
        a, b = a.parent, b.parent
    return True


class CachingBlockManager(BlockManager):
    """Every block is in exactly one of three places:

    blank      no owner, holds nothing worth keeping        taken first
    evictable  no owner, but findable                       taken next, least recently released first
    owned      reference count > 0
    """

    def __init__(self, num_blocks: int, block_size: int, stats: StepStats) -> None:
        super().__init__(num_blocks, block_size, stats)
        self.cache = PrefixCache(block_size)
        self.ref_counts = [0] * num_blocks
        self.evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.evictable)

    def claim(self, seq: Sequence, num_tokens: int) -> bool:
        """Like BlockManager.claim, but shares the blocks of the longest cached prefix, whose KV
        need not be computed again.
        """
        # log-probabilities of a prompt need all of it computed
        hits = [] if getattr(seq, "skips_cache", False) else self.cache.match(seq.token_ids)
        shared = [hit.block for hit in hits]
        needed = self.blocks_for(num_tokens) - len(shared)
        if needed + sum(self.ref_counts[block] == 0 for block in shared) > self.num_free:
            return False
        self.share(shared)
        seq.block_table = shared + self.allocate(needed)
        seq.num_published = len(shared)
        seq.published_tail = hits[-1] if hits else None
        seq.num_scheduled = len(shared) * self.block_size
        if seq.num_lost:
            self.stats.prefix_refound_tokens += seq.num_scheduled
        else:
            seq.num_cached_tokens = seq.num_scheduled
            self.stats.prefix_lookup_tokens += len(seq.token_ids)
            self.stats.prefix_hit_tokens += seq.num_scheduled
        return True

    def shared_tokens(self, token_ids: SequenceOf[int]) -> int:
        """Tokens of the longest cached prefix in blocks that already have an owner: sharing those
        takes no memory.
        """
        return (
            sum(self.ref_counts[hit.block] > 0 for hit in self.cache.match(token_ids))
            * self.block_size
        )

    def coming(self, seqs: Iterable[Sequence]) -> set[int]:
        """Keys of the full blocks that these requests are computing and that cannot be found yet."""
        return {
            key
            for seq in seqs
            if seq.num_published >= 0
            for key in self.cache.keys(
                seq.token_ids,
                seq.num_published,
                seq.published_tail,  # type: ignore[arg-type]
            )
        }

    def had_better_wait(self, seq: Sequence, coming: set[int]) -> bool:
        """Whether at least half of what the request would compute will be found once `coming` is
        cached. A hash collision costs one step of waiting.
        """
        hits, size = self.cache.match(seq.token_ids), self.block_size
        keys = self.cache.keys(seq.token_ids[:-1], len(hits), hits[-1] if hits else None)
        found = sum(1 for _ in takewhile(coming.__contains__, keys))
        return 2 * found * size >= len(seq.token_ids) - len(hits) * size

    def share(self, blocks: Iterable[int]) -> None:
        """Adds an owner to blocks that were found."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self.evictable[block]
            self.ref_counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Removes an owner. The last blocks are released first, so that a prefix outlives what
        follows it.
        """
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if block in self.cache:
                    self.evictable[block] = None
                else:
                    self.blank.append(block)

    def publish(self, seq: Sequence, num_computed: int) -> None:
        """Makes the blocks that are full of computed tokens findable. Called at commit, so whatever
        is found is computed.
        """
        while seq.num_published >= 0 and (seq.num_published + 1) * self.block_size <= num_computed:
            i = seq.num_published
            tail = self.cache.insert(seq.block_table[i], seq.token_ids, i, seq.published_tail)  # type: ignore[arg-type]
            seq.published_tail = tail
            seq.num_published = -1 if tail is None else i + 1  # -1: its chain ends here

    def forget_prefixes(self) -> None:
        """Forgets every prefix that no request uses."""
        while self.evictable:
            self.blank.append(self._evict())

    def _take(self) -> int:
        block = self.blank.pop() if self.blank else self._evict()
        self.ref_counts[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self.evictable.popitem(last=False)
        self.cache.evict(block)
        self.stats.prefix_evictions += 1
        return block
