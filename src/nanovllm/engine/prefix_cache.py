"""Which blocks of the KV cache hold which tokens: a chained hash from a prefix to its block. Loaded only when on. No torch.

    root <- CachedBlock(tokens 0..15) <- CachedBlock(tokens 16..31) <- ...

A block's key is xxh64(parent's key, its tokens). The key only finds a candidate: a hit is served after the candidate's
tokens and its parent, by identity, were compared. By induction over the chain a hit is the same prefix; a collision is a miss.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf

import xxhash

from nanovllm.engine.stats import StepStats


class CachedBlock:
    """One full block whose KV is computed and may be shared. `block` is -1 after its eviction."""

    __slots__ = ("block", "key", "parent", "tokens")

    def __init__(self, block: int, key: int, parent: CachedBlock | None, tokens: bytes) -> None:
        self.block = block
        self.key = key
        self.parent = parent
        self.tokens = tokens


class PrefixCache:
    """Maps prefixes to blocks. It owns no block: BlockManager says which may be evicted, and tells this class."""

    def __init__(self, block_size: int, stats: StepStats) -> None:
        self.block_size = block_size
        self.stats = stats
        self._by_key: dict[int, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def match(self, token_ids: SequenceOf[int]) -> list[CachedBlock]:
        """The longest cached prefix, in whole blocks. At least one token is always left: it has logits to compute."""
        hits: list[CachedBlock] = []
        parent: CachedBlock | None = None
        limit = (len(token_ids) - 1) // self.block_size
        for i in range(limit):
            tokens = self._tokens(token_ids, i)
            found = self._by_key.get(self._key(parent, tokens))
            if found is None or found.tokens != tokens or found.parent is not parent:
                break
            hits.append(found)
            parent = found
        return hits

    def insert(self, block: int, token_ids: SequenceOf[int], index: int, parent: CachedBlock | None) -> CachedBlock | None:
        """Makes block `index` of this prefix findable, once its KV is computed; returns what holds that prefix now.

        An equal prefix that is already there stays. None (the chain ends here) where the parent was evicted or another
        prefix has the same key.
        """
        if (index > 0 and parent is None) or (parent is not None and parent.block < 0):
            return None
        tokens = self._tokens(token_ids, index)
        key = self._key(parent, tokens)
        present = self._by_key.get(key)
        if present is not None:
            return present if present.tokens == tokens and present.parent is parent else None
        entry = self._by_key[key] = self._by_block[block] = CachedBlock(block, key, parent, tokens)
        return entry

    def evict(self, block: int) -> None:
        """Forgets what `block` holds, before it is given to another owner."""
        entry = self._by_block.pop(block)
        del self._by_key[entry.key]
        entry.block = -1
        self.stats.prefix_evictions += 1

    def _tokens(self, token_ids: SequenceOf[int], index: int) -> bytes:
        return array("i", token_ids[index * self.block_size : (index + 1) * self.block_size]).tobytes()

    def _key(self, parent: CachedBlock | None, tokens: bytes) -> int:
        return xxhash.xxh64_intdigest(tokens, seed=parent.key if parent else 0)

    def check_invariants(self) -> None:
        """Raises AssertionError where the two maps disagree."""
        assert len(self._by_key) == len(self._by_block), "an entry is in one map only"
        for block, entry in self._by_block.items():
            assert entry.block == block, f"block {block} is listed with the entry of {entry.block}"
            assert self._by_key.get(entry.key) is entry, f"block {block} cannot be found by its key"
