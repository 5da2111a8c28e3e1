"""What a step has to do, counted from its plan: tokens, KV positions, pairs of positions, rows. No
times.

How a step is run follows the rules of nanovllm.gpu: decodes are replayed from a CUDA graph padded to
a bucket, a short prefill from another, and a mixed step with a short prefill as both of them where
reading the weights twice takes little time. Anything else is launched kernel by kernel. The constants
are those of that package, which needs torch; a test compares them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from nanovllm.config import Optimizations
from nanovllm.engine.scheduler import StepPlan

PREFILL_BUCKETS, PREFILL_ENTRIES = (64, 128, 256, 512, 1024), 16
SHARING_KV_HEADS = 208
GROUP = 16
"""Decodes whose pages PyTorch's attention gathers together."""


def buckets_for(max_num_seqs: int) -> list[int]:
    """Numbers of decodes that have a graph."""
    return [b for b in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if b < max_num_seqs] + [
        max_num_seqs
    ]


@dataclass(frozen=True, slots=True)
class StepWork:
    """Counts of one step on one rank, padding included. A step has one forward pass, or two: then the
    first is of the decodes and the second of the prefills.
    """

    eager: int  # forward passes whose kernels are launched one by one
    replayed: int  # graphs replayed that hold a whole decode step
    short: int  # prefills whose forward pass is replayed, the rest launched one by one
    rows: int  # requests in the step
    tokens: int  # of the first forward pass
    more_tokens: int  # of the second one; 0 if there is none
    sampled: int  # rows whose logits are computed
    noisy: int  # those of them that are sampled with noise
    kv_tokens: int  # different KV positions that decodes read
    again: int  # KV positions that they read after another request of the step has: 0 with cascade attention
    gathered: int  # KV positions that PyTorch's attention gathers for decodes
    groups: int  # calls of PyTorch's attention for decodes
    prefills: int  # prompts, or chunks of one, that are computed
    chunks: int  # those of them that begin behind KV of earlier steps
    pairs: int  # pairs of positions in the attention of prefills

    @property
    def forwards(self) -> int:
        return 2 if self.more_tokens else 1

    @property
    def kind(self) -> str:
        """How the step is run."""
        if self.eager:
            return "eager"
        return "two replays" if self.more_tokens else "prefill replay" if self.short else "replay"


class WorkCounter:
    """Counts the work of one plan after the other, in their order: it remembers which block each row
    begins with, and which blocks it holds where shared ones are read once.
    """

    def __init__(
        self,
        optimizations: Optimizations,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_kv_heads: int,
        splits: bool,
    ) -> None:
        """num_kv_heads: of the model, not of a rank. splits: whether a mixed step with a short prefill is
        run as two replays.
        """
        self.on: Any = optimizations
        self.buckets = buckets_for(max_num_seqs)
        self.max_model_len, self.block_size, self.splits = max_model_len, block_size, splits
        ranks = self.on.tensor_parallel_size
        self.fewest_sharing = -(-SHARING_KV_HEADS * ranks // num_kv_heads)
        self.tables: dict[int, list[int]] = {}

    def __call__(self, plan: StepPlan) -> StepWork:
        if self.on.prefix_cache:
            self._remember(plan)
        n, rows = plan.num_decodes, len(plan.rows)
        prefills, prefill_tokens = rows - n, len(plan.token_ids)
        is_short = (
            self.on.cuda_graphs
            and self.on.attention_backend == "triton"
            and 0 < prefill_tokens <= PREFILL_BUCKETS[-1]
            and prefills <= PREFILL_ENTRIES
        )
        replays = self.on.cuda_graphs and n > 0 and not plan.filtered
        pads = replays and (prefills == 0 or (is_short and self.splits))
        split = pads and prefills > 0
        short = is_short and (n == 0 or split)
        bucket = self.buckets[bisect_left(self.buckets, n)] if pads else n
        padded = PREFILL_BUCKETS[bisect_left(PREFILL_BUCKETS, prefill_tokens)] if short else None
        prefill_tokens = padded or prefill_tokens
        tokens, more = (
            (bucket, prefill_tokens) if split else ((bucket if n else 0) + prefill_tokens, 0)
        )
        lengths = sorted(start + 1 for start in plan.starts[:n])
        in_graph = self.on.attention_backend == "torch" and pads
        sampled = sum(plan.samples[n:]) + bucket
        every = sum(lengths)
        again = self._again(plan) if self.on.prefix_cache else 0
        once = self.on.cascade_attention and pads and self._many_share(plan)
        return StepWork(
            eager=int(not pads and not short),
            replayed=int(pads),
            short=int(short),
            rows=rows,
            tokens=tokens,
            more_tokens=more,
            sampled=sampled,
            noisy=0 if plan.greedy_only else sampled,
            kv_tokens=every - again,
            again=0 if once else again,
            gathered=bucket * self.max_model_len if in_graph else self._gathered(lengths),
            groups=-(-bucket // GROUP),
            prefills=prefills,
            chunks=sum(start > 0 for start in plan.starts[n:]),
            pairs=sum(
                length * start + length * (length + 1) // 2
                for start, length in zip(plan.starts[n:], plan.query_lens[n:], strict=True)
            ),
        )

    def _gathered(self, lengths: list[int]) -> int:
        """Groups of requests of similar length are padded to whole blocks of their longest."""
        total = 0
        for first in range(0, len(lengths), GROUP):
            group = lengths[first : first + GROUP]
            total += len(group) * -(-group[-1] // self.block_size) * self.block_size
        return total

    def _again(self, plan: StepPlan) -> int:
        """KV positions in blocks that another decode of the step reads as well, but for one of them."""
        tables = [self.tables[row] for row in plan.rows[: plan.num_decodes]]
        if len({table[0] for table in tables}) == len(tables):
            return 0  # a shared prefix begins with a shared block
        distinct = len({block for table in tables for block in table})
        return (sum(map(len, tables)) - distinct) * self.block_size

    def _many_share(self, plan: StepPlan) -> bool:
        firsts = [self.tables[row][0] for row in plan.rows[: plan.num_decodes]]
        return len(firsts) - len(set(firsts)) >= self.fewest_sharing

    def _remember(self, plan: StepPlan) -> None:
        for row, column, block in plan.new_blocks:
            table = self.tables.setdefault(row, [])
            del table[column:]
            table.append(block)
