"""How many waiting requests may start so that the running ones can finish. Loaded with continuous
batching. No torch.

A request holds one more token of KV after each step and frees all of it when it ends. So the total
is largest just before some request ends, and can be computed in advance: when the request with n
tokens left ends, each request that lives longer has grown by n.

    KV held      _/|  _/|        a new request may start if, with it,
             __/|/ |_/  |_       no peak exceeds the size of the cache
            /                    ("past-future scheduler", Gong et al., ASPLOS'25)

A request's length is known where it must use all of its max_tokens. Where requests may stop
earlier, the estimate is the share of max_tokens that finished requests have used. An estimate that
is too low costs a preemption, not a result.
"""

import math
from collections.abc import Iterable

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

GATHERED = 8
"""With CUDA graphs, requests are admitted only once 1 in this many running ones can be replaced: a
step with a prefill is no replay and took 12.5 ms instead of 2 on an H200 (ablations/LOG.md). Where
every waiting request fits, all start at once.
"""


class Forecast:
    """Predicts the KV that running requests will hold. A query costs O(n log n) for n running
    requests.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        # tokens found in blocks that are in use, with a prefix cache
        self.shared_tokens = getattr(blocks, "shared_tokens", lambda _: 0)
        self.asked = self.used = 0  # tokens, summed over finished requests

    def finished(self, seq: Sequence) -> None:
        """Records how much of its max_tokens a request has used."""
        self.asked += seq.params.max_tokens
        self.used += seq.num_output_tokens

    def longest(self, seq: Sequence) -> int:
        """Tokens that it is expected to hold at its end, plus half a block, which on average stays
        empty.
        """
        return len(seq.token_ids) + seq.pending + self._to_come(seq) + self.blocks.block_size // 2

    def fits(self, running: Iterable[Sequence], joining: Iterable[Sequence]) -> bool:
        """Whether all of them can run to their expected end together."""
        size = self.blocks.block_size
        requests, own_blocks = [], 0
        for seq in running:
            own_blocks += len(seq.block_table) - seq.num_cached_tokens // size
            requests.append(
                (self._to_come(seq), len(seq.token_ids) + seq.pending - seq.num_cached_tokens)
            )
        requests += [
            (self._to_come(seq), len(seq.token_ids) - self.shared_tokens(seq.token_ids))
            for seq in joining
        ]
        # shared prefixes count once
        held = max(0, self.blocks.num_blocks - self.blocks.num_free - own_blocks) * size
        capacity = self.blocks.num_blocks * size
        for i, (to_come, now) in enumerate(sorted(requests, reverse=True), 1):
            held += now
            # on average half of each request's last block is empty
            if held + i * (to_come + size // 2) > capacity:
                return False
        return True

    def _to_come(self, seq: Sequence) -> int:
        share = self.used / self.asked if self.asked else 1.0
        return math.ceil(share * (seq.params.max_tokens - seq.num_output_tokens - seq.pending))
