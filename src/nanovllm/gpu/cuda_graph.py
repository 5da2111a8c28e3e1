"""cuda_graphs=True: decode steps captured once and replayed, sampling included. Loaded only when
on.

A graph holds everything between two tokens: it gathers each row's state, runs the model, samples,
and advances the positions. A step with the same rows as the last one needs no input at all:

    inputs     [ rows: b | positions: b ]         uploaded only where the set of rows has changed
    row state  block_tables, last_tokens, temperatures, seeds      as the eager runner keeps it
    graph      state[rows] -> model -> logits -> sample -> last_tokens[rows], positions + 1

There is a graph for each bucket b of batch sizes. A batch between two buckets is padded with the
spare row. Its K and V go to the spare block, its position stays 0 and its length is 0, so attention
skips it. What a graph cannot do (prefill, top-k, top-p, log-probabilities, options that edit logits)
runs eagerly on the same state; the decodes of a step that has a short prefill as well (prefill_graph.py) are replayed where
reading the weights twice takes less than launching the kernels of the step one by one. With
cascade_attention=True, larger batches have a second graph for steps in which many rows share their
first block with another row; the host, which knows the block tables, chooses.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.engine.model_runner import StepHandle
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.stats import StepStats
from nanovllm.gpu.capture import Captured, capture
from nanovllm.gpu.prefill_graph import ShortPrefills, is_short
from nanovllm.gpu.runner import GpuRunner
from nanovllm.gpu.step_memory import room_for
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import ModelConfig
from nanovllm.toggles.counters import reset

SHARING_KV_HEADS = 208
"""Reading prefixes once pays off from this many (sharing sequences x KV heads), summed over all
prefixes: it costs 1.6 us per tile, however many share it, instead of 7.6 ns per pair. Computed from
a step of an H200 with 1,984 pairs.
"""


SECOND_READ_S = 1e-3
"""A mixed step of few prefill tokens is run as two captured parts, decodes and prefills, where the
weights, which are then read twice, are read within this time: launching the kernels of an eager
step one by one takes a host several times as long.
"""


def fewest_sharing(num_kv_heads: int, num_ranks: int = 1) -> int:
    """The least number of requests that must share prefixes before those are read once. A rank
    holds num_kv_heads / num_ranks of the model's KV heads.
    """
    return -(-SHARING_KV_HEADS * num_ranks // num_kv_heads)


def buckets_for(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph, ascending: 1, 2, 4, 8, multiples of 16, and max_num_seqs
    itself.
    """
    return [b for b in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if b < max_num_seqs] + [
        max_num_seqs
    ]


def halves(plan: StepPlan) -> tuple[StepPlan, StepPlan]:
    """Splits a mixed step into a step of its decodes and a step of its prefills, in this order.
    The first carries all changes of rows and blocks.
    """
    n = plan.num_decodes
    decodes = replace(
        plan,
        rows=plan.rows[:n],
        starts=plan.starts[:n],
        query_lens=plan.query_lens[:n],
        samples=plan.samples[:n],
        token_ids=[],
    )
    prefills = replace(
        plan,
        num_decodes=0,
        rows=plan.rows[n:],
        starts=plan.starts[n:],
        query_lens=plan.query_lens[n:],
        samples=plan.samples[n:],
        new_rows=[],
        new_blocks=[],
    )
    return decodes, prefills


def read_s(num_bytes: int, device: torch.device) -> float:
    """Seconds that a GPU needs to read as many bytes of its memory, by its data sheet; infinite
    where the driver does not tell.
    """
    gpu: Any = torch.cuda.get_device_properties(device)
    # kHz, bits; two transfers per clock
    rate = getattr(gpu, "memory_clock_rate", 0) * 1e3 * getattr(gpu, "memory_bus_width", 0) / 8 * 2
    return num_bytes / rate if rate > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Variant:
    """Which decode step a graph holds."""

    bucket: int
    greedy: bool  # draws no noise
    shares: bool  # reads shared prefixes once


class GraphRunner(GpuRunner):
    """The interface of ModelRunner; decode steps are replayed. Raises MemoryError where the model
    or the captured steps do not fit, saying what to lower.
    """

    spare = 1
    splits = False  # whether a mixed step of few prefill tokens is run as two captured parts

    def __init__(
        self,
        resolved: ResolvedConfig,
        model_config: ModelConfig,
        folder: Path,
        stats: StepStats,
        tp: TensorParallel | None = None,
    ) -> None:
        self.buckets = buckets_for(resolved.max_num_seqs)
        # Our Triton sampler skips the noise of greedy rows by itself; the others need a second graph
        # without noise.
        self.greedy_variants = (
            (False,) if resolved.optimizations.kernels == "triton" else (False, True)
        )
        level = "triton" if resolved.optimizations.kernels == "triton" else "torch"
        self.ends = import_module(f"nanovllm.kernels.{level}.decode_step")
        self.spare_row = resolved.max_num_seqs
        self.cascade = resolved.optimizations.cascade_attention
        self.fewest_sharing = fewest_sharing(
            model_config.num_key_value_heads, resolved.optimizations.tensor_parallel_size
        )
        self.variants = [
            Variant(bucket, greedy, shares)
            # the largest first: the others reuse its memory
            for bucket in reversed(self.buckets)
            for greedy in self.greedy_variants
            for shares in (
                (False, True) if self.cascade and bucket > self.fewest_sharing else (False,)
            )
        ]
        with room_for(
            "the model",
            "free memory on the device, or share it out over more GPUs (tensor_parallel_size)",
        ):
            super().__init__(resolved, model_config, folder, stats, tp)
        self.block_tables[self.spare_row] = self.num_blocks  # the spare block
        with room_for(
            f"capturing steps of up to {resolved.max_num_seqs} requests, beside weights and KV cache,",
            "lower kv_cache_memory_bytes, gpu_memory_utilization or max_num_seqs",
        ):
            self.captured = self._capture_all()
        self.splits = self._second_read_is_cheap()
        reset(stats)

    def make_rows(self) -> None:
        super().make_rows()
        with self.device:
            self.inputs = torch.zeros(2 * self.config.max_num_seqs, dtype=torch.int64)
            self.query_start_loc = torch.arange(self.config.max_num_seqs + 1, dtype=torch.int64)
        # the bucket, rows and positions that `inputs` holds
        self.on_device: tuple[int, list[int], list[int]] | None = None
        self.first_blocks = [-1] * (self.config.max_num_seqs + 1)  # each row's first block
        self.share = False  # whether many of the rows in `inputs` share a prefix

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> StepHandle:
        """Replays a decode step, and both halves of a mixed step where that pays; runs any other
        step eagerly.
        """
        edits = self.processors is not None and any(
            row in self.processors for row in plan.rows[: plan.num_decodes]
        )
        if plan.num_decodes and not plan.filtered and not edits and plan.num_logprobs is None:
            if plan.num_decodes == len(plan.rows):
                return self._read_back(self._replay(plan))
            if self.splits and is_short(plan):
                decodes, prefills = halves(plan)
                # a copy, as the other graph may use the memory that this one leaves its tokens in
                token_ids = self._replay(decodes).clone()
                return self._read_back(torch.cat((token_ids, *self._run(prefills))))
        self.on_device = None
        return super().submit(plan)

    def _replay(self, plan: StepPlan) -> Tensor:
        """The tokens of a plan of decodes: [entries], overwritten by the next replay."""
        n = len(plan.rows)
        bucket = self.buckets[bisect.bisect_left(self.buckets, n)]
        self._update_rows(plan)
        if self.on_device != (bucket, plan.rows, plan.starts):
            padding = bucket - n
            values = plan.rows + [self.spare_row] * padding + plan.starts + [0] * padding
            self.inputs[: 2 * bucket] = self._tensor(values)
            self.share = self.cascade and self._many_share(plan.rows)
        captured = self.captured[
            Variant(bucket, plan.greedy_only and True in self.greedy_variants, self.share)
        ]
        token_ids = captured.replay(self.stats)
        self.on_device = (bucket, plan.rows, [start + 1 for start in plan.starts])
        return token_ids[:n]

    def _many_share(self, rows: list[int]) -> bool:
        self.stats.attention_calls["cascade"] += 1  # counts the steps that looked
        return len(rows) - len({self.first_blocks[row] for row in rows}) >= self.fewest_sharing

    def _update_rows(self, plan: StepPlan) -> None:
        for row, column, block in plan.new_blocks:
            if column == 0:
                self.first_blocks[row] = block
        if plan.new_blocks:  # one kernel: nearly every step of a large batch has new blocks
            self.ends.write_blocks(self.block_tables, self._tensor(plan.new_blocks))
            plan = replace(plan, new_blocks=[])
        super()._update_rows(plan)

    def _capture_all(self) -> dict[Variant, Captured]:
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        # other backends need lengths on the host
        if self.config.optimizations.attention_backend == "triton":
            spare_slot = self.num_blocks * self.config.block_size
            self.model = ShortPrefills(
                self.model,
                self.attention,
                self.stats,
                self.kv_caches,  # type: ignore[assignment]
                self.block_tables.shape[1],
                spare_slot,
                pool,
                stream,
            )
        return {variant: self._capture(variant, pool, stream) for variant in self.variants}

    def _second_read_is_cheap(self) -> bool:
        """Whether a mixed step with few prefill tokens is faster as two replays. All ranks must
        decide alike, because each half has all-reduces of its own.
        """
        # with other backends no prefill is captured
        if self.device.type != "cuda" or self.config.optimizations.attention_backend != "triton":
            return False
        weights = sum(weight.nbytes for weight in self.model.parameters())
        return self.tp.agree_on_least(int(read_s(weights, self.device) <= SECOND_READ_S)) == 1

    def _capture(self, variant: Variant, pool: Any, stream: torch.cuda.Stream) -> Captured:
        self.inputs[: variant.bucket] = self.spare_row
        self.inputs[variant.bucket :] = 0
        return capture(lambda: self._decode(variant), self.stats, pool, stream)

    def _decode(self, variant: Variant) -> Tensor:
        """A decode step of the rows in `inputs`, using tensors only. Returns the sampled tokens:
        [bucket].
        """
        bucket = variant.bucket
        rows, positions = self.inputs[:bucket], self.inputs[bucket : 2 * bucket]
        inputs = self.ends.gather_decode_inputs(
            rows,
            positions,
            self.block_tables,
            self.last_tokens,
            self.temperatures,
            self.seeds,
            self.config.block_size,
        )
        batch = ForwardBatch(
            token_ids=inputs.token_ids,
            positions=positions,
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            seq_lens=inputs.seq_lens,
            query_start_loc=self.query_start_loc[: bucket + 1],
            num_decodes=bucket,
            host_query_lens=[1] * bucket,
            host_seq_lens=[self.config.max_model_len] * bucket,  # the graph must serve every length
        )
        self.attention.prepare(batch, **({"share": True} if variant.shares else {}))
        logits = self.model.logits(self.model(batch, self.kv_caches))
        token_ids = self.kernels.sample(
            # top-k and top-p are not read: no row has a filter
            logits,
            inputs.temperatures,
            self.top_ks[:bucket],
            self.top_ps[:bucket],
            inputs.seeds,
            inputs.next_positions,
            all_greedy=variant.greedy,
            any_top_k_top_p=False,
        )
        self.ends.advance_rows(rows, positions, self.last_tokens, token_ids)
        return token_ids
