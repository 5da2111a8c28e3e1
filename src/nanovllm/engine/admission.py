"""How many waiting requests may start, so that those that run can finish. Loaded with continuous
batching. No torch.

A request holds one token of KV more at each step and gives all back when it ends. So what all of
them hold together is largest just before one of them ends, and can be foreseen: at the end of the
one with n tokens to come, each that lives longer has grown by n.

    KV held      _/|  _/|        a new request may start if no peak,
             __/|/ |_/  |_       with it, is above the size of the cache
            /                    ("past-future scheduler", Gong et al., ASPLOS'25)

How long a request will get is known where it must use its max_tokens. Where requests stop before,
the tokens they have used so far of those they asked for are the estimate. Too low an estimate costs
a preemption, not a result.
"""

import math
from collections.abc import Iterable

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

GATHERED = 8
"""With CUDA graphs, one running request in so many must be replaced before any is. A step with a prefill is no replay: on an H200
it took 12.5 ms instead of 2 (ablations/LOG.md). Where every waiting request fits, none waits."""


class Forecast:
    """What the running requests will hold. Costs O(n log n) when asked; n requests run."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        # of the prefix cache, where there is one
        self.shared_tokens = getattr(blocks, "shared_tokens", lambda _: 0)
        self.asked = self.used = 0  # tokens, of requests that have finished

    def finished(self, seq: Sequence) -> None:
        """Learns how much of its max_tokens a request has used."""
        self.asked += seq.params.max_tokens
        self.used += seq.num_output_tokens

    def longest(self, seq: Sequence) -> int:
        """Tokens it is expected to hold at its end, and half of a block, which stays empty."""
        return len(seq.token_ids) + seq.pending + self._to_come(seq) + self.blocks.block_size // 2

    def fits(self, running: Iterable[Sequence], joining: Iterable[Sequence]) -> bool:
        """Whether all can run to their expected end together."""
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
        # shared prefixes, once
        held = max(0, self.blocks.num_blocks - self.blocks.num_free - own_blocks) * size
        capacity = self.blocks.num_blocks * size
        for i, (to_come, now) in enumerate(sorted(requests, reverse=True), 1):
            held += now
            # half of everyone's last block is empty
            if held + i * (to_come + size // 2) > capacity:
                return False
        return True

    def _to_come(self, seq: Sequence) -> int:
        share = self.used / self.asked if self.asked else 1.0
        return math.ceil(share * (seq.params.max_tokens - seq.num_output_tokens - seq.pending))
