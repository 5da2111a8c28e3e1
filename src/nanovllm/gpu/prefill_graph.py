"""Short prefills captured once and replayed: part of cuda_graphs=True. Loaded only when on.

A prefill of up to a thousand tokens is a millisecond of work for a GPU, and ten for the host that
launches its kernels one by one. So the model's forward pass, and only that, is captured for a few
numbers of tokens; a step between two of them is padded:

    tokens     0 .. n - 1 are the step's; the K and V of the others go to the spare block, and their results are not read
    entries    those after the step's have no query tokens

Everything around the forward pass (the batch, logits, sampling) runs eagerly, and any other step is
eager as a whole.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.stats import StepStats
from nanovllm.gpu.capture import Captured, capture
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.layers.attention import Attention, KVCache

TOKENS = (64, 128, 256, 512, 1024)
"""Numbers of tokens that get a graph. With more tokens the GPU takes longer than the host."""
ENTRIES = 16


def is_short(plan: StepPlan) -> bool:
    """Whether there is a graph for the prefills of a step."""
    return len(plan.token_ids) <= TOKENS[-1] and len(plan.rows) - plan.num_decodes <= ENTRIES


class ShortPrefills:
    """Takes the place of the model and has its interface; short prefills are replayed."""

    def __init__(
        self,
        model: Any,
        attention: Attention,
        stats: StepStats,
        kv_caches: list[KVCache],
        max_blocks: int,
        spare_slot: int,
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        """max_blocks: columns of a block table. spare_slot: where K and V of padding go. pool:
        memory shared by graphs.
        """
        self.model, self.attention, self.stats, self.spare_slot = (
            model,
            attention,
            stats,
            spare_slot,
        )
        with kv_caches[0][0].device:
            self.token_ids, self.positions, self.slots = torch.zeros(
                3, TOKENS[-1], dtype=torch.int64
            )
            self.block_tables = torch.zeros(ENTRIES, max_blocks, dtype=torch.int32)
            self.seq_lens = torch.zeros(ENTRIES, dtype=torch.int32)
            self.query_start_loc = torch.zeros(ENTRIES + 1, dtype=torch.int64)
        self.slots.fill_(spare_slot)
        self.captured = {
            bucket: self._capture(bucket, kv_caches, pool, stream) for bucket in reversed(TOKENS)
        }

    def __call__(self, batch: ForwardBatch, kv_caches: list[KVCache]) -> Tensor:
        """-> hidden states: [tokens, hidden]."""
        num_tokens, num_entries = len(batch.token_ids), len(batch.host_query_lens)
        if batch.num_decodes or num_tokens > TOKENS[-1] or num_entries > ENTRIES:
            return self.model(batch, kv_caches)  # type: ignore[no-any-return]
        captured = self.captured[TOKENS[bisect.bisect_left(TOKENS, num_tokens)]]
        self.token_ids[:num_tokens] = batch.token_ids
        self.positions[:num_tokens] = batch.positions
        self.slots[:num_tokens] = batch.slot_mapping
        self.slots[num_tokens:] = self.spare_slot
        self.block_tables[:num_entries, : batch.block_tables.shape[1]] = batch.block_tables
        self.seq_lens[:num_entries] = batch.seq_lens
        self.query_start_loc[: num_entries + 1] = batch.query_start_loc
        self.query_start_loc[num_entries + 1 :] = num_tokens
        return captured.replay(self.stats)[:num_tokens]

    def parameters(self) -> Iterator[Tensor]:
        """Those of the model."""
        return self.model.parameters()  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary]."""
        return self.model.logits(hidden)

    def _capture(
        self, bucket: int, kv_caches: list[KVCache], pool: Any, stream: torch.cuda.Stream
    ) -> Captured:
        return capture(lambda: self._forward(bucket, kv_caches), self.stats, pool, stream)

    def _forward(self, bucket: int, kv_caches: list[KVCache]) -> Tensor:
        batch = ForwardBatch(
            token_ids=self.token_ids[:bucket],
            positions=self.positions[:bucket],
            slot_mapping=self.slots[:bucket],
            block_tables=self.block_tables,
            seq_lens=self.seq_lens,
            query_start_loc=self.query_start_loc,
            num_decodes=0,
            # the most query tiles that a step of this bucket can have
            host_query_lens=[bucket] + [1] * (ENTRIES - 1),
            host_seq_lens=[0] * ENTRIES,  # not read
        )
        self.attention.prepare(batch)
        return self.model(batch, kv_caches)  # type: ignore[no-any-return]
