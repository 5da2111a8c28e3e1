"""Engines that are wrong: each is a small patch, from outside, of real functions. The property
tests must catch every one.

Those marked with a number repeat a bug that engines of this kind have had
(docs/bad-implementations.md lists them); the others are the classics. A mistake made here is worth
a patch here.
"""

from __future__ import annotations

import bisect
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from nanovllm.config import EngineConfig
from nanovllm.distributed import workers
from nanovllm.engine import model_runner, priority
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.kv_cache import KVCacheSpec
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.prefix_cache import CachedBlock, CachingBlockManager, PrefixCache
from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.gpu import cuda_graph
from nanovllm.kernels import torch as kernels
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.torch import attention, filtering, kv_store, norm, rope, sampling
from nanovllm.models import config as model_config
from nanovllm.models import loader
from nanovllm.quantization import kv_cache as small_cache
from nanovllm.quantization import weights as quantized
from nanovllm.requests import logit_processors, sequences, stop_strings
from nanovllm.sampling_params import SamplingParams
from nanovllm.serving import answers, async_llm, step_thread, streams
from property_tests.support.ranks import Group, collectives

Patch = tuple[Any, str, Any]  # owner, name of the attribute, what stands there instead


@dataclass(frozen=True)
class BadImplementation:
    """kind: of the mistakes for which it stands (kill_matrix.KINDS). fact: the number in the list of
    known bugs, or "". killer: the property that must catch it.
    """

    name: str
    what: str
    kind: str
    fact: str
    killer: str
    patches: Callable[[], list[Patch]]

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, replacement in self.patches():
                stack.enter_context(
                    patch.object(owner, name, replacement, create=isinstance(replacement, property))
                )
            yield


BAD: list[BadImplementation] = []


def bad(killer: str, kind: str, fact: str = "") -> Callable[[Callable[[], list[Patch]]], None]:
    def register(patches: Callable[[], list[Patch]]) -> None:
        BAD.append(
            BadImplementation(
                patches.__name__,
                " ".join((patches.__doc__ or "").split()),
                kind,
                fact,
                killer,
                patches,
            )
        )

    return register


# -- prefix cache and blocks -----------------------------------------------------------------------


@bad("engine_machine", "off by one", "1")
def fully_cached_prompt_has_nothing_to_compute() -> list[Patch]:
    """Every block of a prompt may be a hit, so that no query token is left."""

    def match(self: PrefixCache, token_ids: list[int]) -> list[CachedBlock]:
        return real(self, [*token_ids, -1])

    real = PrefixCache.match
    return [(PrefixCache, "match", match)]


@bad("engine_machine", "stale state", "2")
def blocks_are_found_before_they_are_computed() -> list[Patch]:
    """A block is findable as soon as it is claimed, so an equal prompt of the same step reads KV
    that nobody has written.
    """

    def claim(self: CachingBlockManager, seq: Sequence, num_tokens: int) -> bool:
        claimed = real(self, seq, num_tokens)
        if claimed:
            self.publish(seq, len(seq.token_ids))
        return claimed

    real = CachingBlockManager.claim
    return [(CachingBlockManager, "claim", claim)]


@bad("whole_workloads", "stale state", "2")
def a_chunk_publishes_the_next_block_as_well() -> list[Patch]:
    """The block after the computed ones is published with them."""

    def publish(self: CachingBlockManager, seq: Sequence, num_computed: int) -> None:
        real(self, seq, min(num_computed + self.block_size, len(seq.token_ids)))

    real = CachingBlockManager.publish
    return [(CachingBlockManager, "publish", publish)]


@bad("engine_machine", "mistaken identity", "3")
def the_parent_is_not_part_of_the_key() -> list[Patch]:
    """A block is found by its own tokens, whatever came before them."""

    def match(self: PrefixCache, token_ids: list[int]) -> list[CachedBlock]:
        hits: list[CachedBlock] = []
        for i in range((len(token_ids) - 1) // self.block_size):
            tokens = self._tokens(token_ids, i)
            found = next(
                (entry for entry in self.by_block.values() if entry.tokens == tokens), None
            )
            if found is None or found in hits:
                break
            hits.append(found)
        return hits

    return [(PrefixCache, "match", match)]


@bad("engine_machine", "stale state", "3")
def a_reused_block_is_still_found() -> list[Patch]:
    """A stale hash outlives the block's reuse."""

    def evict(self: PrefixCache, block: int) -> None:
        self.by_block.pop(block)

    return [(PrefixCache, "evict", evict)]


@bad("engine_machine", "mistaken identity", "3")
def a_collision_is_served() -> list[Patch]:
    """A weak hash, and what it finds is not compared."""

    def match(self: PrefixCache, token_ids: list[int]) -> list[CachedBlock]:
        hits: list[CachedBlock] = []
        for i in range((len(token_ids) - 1) // self.block_size):
            wanted = sum(array("i", self._tokens(token_ids, i)))
            found = next(
                (
                    entry
                    for entry in self.by_block.values()
                    if sum(array("i", entry.tokens)) == wanted
                ),
                None,
            )
            if found is None or found in hits:
                break
            hits.append(found)
        return hits

    return [(PrefixCache, "match", match)]


@bad("engine_machine", "ownership")
def a_live_block_is_evicted() -> list[Patch]:
    """A hit block stays in the list of evictable ones."""

    def share(self: CachingBlockManager, blocks: list[int]) -> None:
        for block in blocks:
            self.ref_counts[block] += 1

    return [(CachingBlockManager, "share", share)]


@bad("engine_machine", "ownership")
def a_reference_is_not_dropped() -> list[Patch]:
    """The last block of a request is never released."""

    def release(self: CachingBlockManager, blocks: list[int]) -> None:
        real(self, blocks[:-1])

    real = CachingBlockManager.release
    return [(CachingBlockManager, "release", release)]


@bad("engine_machine", "ownership")
def a_block_is_released_twice() -> list[Patch]:
    """The first block of a request comes back twice."""

    def release(self: BlockManager, blocks: list[int]) -> None:
        self.blank += [*blocks, *blocks[:1]]

    return [(BlockManager, "release", release)]


@bad("engine_machine", "ownership")
def an_abort_leaks_its_blocks() -> list[Patch]:
    """An aborted request leaves the queue and keeps its blocks."""

    def abort(self: Scheduler, request_id: str) -> Sequence | None:
        with patch.object(type(self.blocks), "release", lambda *_: None):
            return real(self, request_id)

    real = Scheduler.abort
    return [(Scheduler, "abort", abort)]


@bad("engine_machine", "ownership")
def a_row_is_not_given_back() -> list[Patch]:
    """A request that ends keeps its row of the batch."""

    def leave(self: Scheduler, seq: Sequence, queue: Any) -> None:
        rows = list(self.free_rows)
        real(self, seq, queue)
        if seq.finish_reason is not None:
            self.free_rows[:] = rows

    real = Scheduler._leave
    return [(Scheduler, "_leave", leave)]


@bad("engine_machine", "off by one", "4")
def a_block_is_allocated_one_token_late() -> list[Patch]:
    """A request may index one token past its blocks."""

    def blocks_for(self: BlockManager, num_tokens: int) -> int:
        return max(1, -(-(num_tokens - 1) // self.block_size))

    return [(BlockManager, "blocks_for", blocks_for)]


# -- scheduling ------------------------------------------------------------------------------------


@bad("engine_machine", "after a preemption", "4")
def the_resumed_position_is_kept() -> list[Patch]:
    """A preempted request resumes where it was, though its KV is gone."""

    def leave(self: Scheduler, seq: Sequence, queue: Any) -> None:
        scheduled = seq.num_scheduled
        real(self, seq, queue)
        seq.num_scheduled = scheduled

    real = Scheduler._leave
    return [(Scheduler, "_leave", leave)]


@bad("engine_machine", "after a preemption", "4")
def the_sampled_token_is_lost_at_preemption() -> list[Patch]:
    """A preempted request forgets its last token."""

    def leave(self: Scheduler, seq: Sequence, queue: Any) -> None:
        if seq.finish_reason is None and seq.num_output_tokens:
            seq.token_ids.pop()
        real(self, seq, queue)

    real = Scheduler._leave
    return [(Scheduler, "_leave", leave)]


@bad("engine_machine", "after a preemption", "4")
def a_resumed_request_does_not_wait_for_its_own_token() -> list[Patch]:
    """A preempted request is admitted again while a token of it is in flight."""

    def admit(self: ContinuousScheduler, plan: StepPlan) -> None:
        flights = {seq.request_id: seq.in_flight for seq in self.waiting.values()}
        for seq in self.waiting.values():
            seq.in_flight = 0
        waiting = list(self.waiting.values())
        real(self, plan)
        for seq in waiting:
            seq.in_flight += flights[seq.request_id]

    real = ContinuousScheduler._admit
    return [(ContinuousScheduler, "_admit", admit)]


@bad("engine_machine", "order and fairness", "5")
def the_oldest_is_preempted() -> list[Patch]:
    """The oldest is the victim, even where this step has planned it already, and goes to the end of
    the queue.
    """

    def grow(self: ContinuousScheduler, plan: StepPlan, seq: Sequence) -> bool:
        while self.blocks.num_free == 0:
            victim = next(iter(self.decoding.values()))
            self._leave(victim, self.decoding)
            self.waiting[victim.request_id] = victim
            if victim is seq:
                return False
        return real(self, plan, seq)

    real = ContinuousScheduler._grow
    return [(ContinuousScheduler, "_grow", grow)]


@bad("engine_machine", "wrongly taken or refused", "5")
def a_request_larger_than_the_pool_is_taken() -> list[Patch]:
    """A request that no empty pool could hold is queued, and waits for ever."""

    def add(self: Scheduler, seq: Sequence) -> None:
        self.waiting[seq.request_id] = seq

    return [(Scheduler, "add", add)]


@bad("whole_workloads", "across steps")
def a_lagged_commit_appends_twice() -> list[Patch]:
    """With another step in flight, a request's token is appended once more."""

    def commit(
        self: Scheduler, plan: StepPlan, tokens: list[int], logprobs: Any = None
    ) -> list[Sequence]:
        advanced = real(self, plan, tokens, logprobs)
        for seq in advanced:
            if seq.in_flight and seq.finish_reason is None and seq.wants_more:
                seq.append(seq.token_ids[-1])
        return advanced

    real = Scheduler.commit
    return [(Scheduler, "commit", commit)]


@bad("whole_workloads", "across steps")
def a_chunk_samples() -> list[Patch]:
    """The first chunk of a prompt yields a token as if it were the last."""

    def plan_entry(
        self: Scheduler,
        plan: StepPlan,
        seqs: list[Sequence],
        seq: Sequence,
        length: int,
        *,
        samples: bool,
    ) -> None:
        real(self, plan, seqs, seq, length, samples=samples or seq.num_scheduled == 0)

    real = Scheduler._plan_entry
    return [(Scheduler, "_plan_entry", plan_entry)]


@bad("engine_machine", "what is asked does not arrive")
def a_stop_token_is_ignored() -> list[Patch]:
    """Stop tokens do not stop."""

    def append(self: Sequence, token_id: int) -> bool:
        stops, self.stop_token_ids = self.stop_token_ids, frozenset()
        ended = real(self, token_id)
        self.stop_token_ids = stops
        return ended

    real = Sequence.append
    return [(Sequence, "append", append)]


@bad("whole_workloads", "off by one")
def max_tokens_is_passed_by_one() -> list[Patch]:
    """One token more is planned than was asked for."""
    wants_more = property(
        lambda self: self.num_output_tokens + self.pending <= self.params.max_tokens
    )
    return [(Sequence, "wants_more", wants_more)]


@bad("leaving_costs_nothing_per_bystander", "cost", "11")
def the_queue_is_searched() -> list[Patch]:
    """Leaving the running queue looks at everybody in it."""

    def leave(self: Scheduler, seq: Sequence, queue: Any) -> None:
        assert list(queue).index(seq.request_id) >= 0
        real(self, seq, queue)

    real = Scheduler._leave
    return [(Scheduler, "_leave", leave)]


@bad("leaving_costs_nothing_per_bystander", "cost", "11")
def the_free_list_is_searched() -> list[Patch]:
    """Giving a block back looks through the free list for it."""

    def release(self: BlockManager, blocks: list[int]) -> None:
        self.blank += [block for block in reversed(blocks) if block not in self.blank]

    return [(BlockManager, "release", release)]


@bad("engine_machine", "schedulers that guess")
def an_abort_teaches_the_forecast() -> list[Patch]:
    """The forecast of lengths counts an aborted request as if it had come to its end."""

    def abort(self: Scheduler, request_id: str) -> Sequence | None:
        aborted = real(self, request_id)
        if aborted is not None and isinstance(self, ContinuousScheduler):
            self.forecast.finished(aborted)
        return aborted

    real = Scheduler.abort
    return [(Scheduler, "abort", abort)]


# -- batches and graphs ----------------------------------------------------------------------------


def _changed_batch(change: Callable[[ModelRunner, StepPlan, ForwardBatch], None]) -> list[Patch]:
    def batch(self: ModelRunner, plan: StepPlan, rows: torch.Tensor) -> ForwardBatch:
        made = real(self, plan, rows)
        change(self, plan, made)
        return made

    real = ModelRunner._batch
    return [(ModelRunner, "_batch", batch)]


@bad("every_token_is_that_of_hf", "off by one")
def slots_are_off_by_one() -> list[Patch]:
    """K and V of every token go one slot too far."""

    def change(self: ModelRunner, plan: StepPlan, batch: ForwardBatch) -> None:
        batch.slot_mapping = (batch.slot_mapping + 1) % (self.num_blocks * self.config.block_size)

    return _changed_batch(change)


@bad("preemption_changes_nothing", "after a preemption", "4")
def rope_restarts_after_preemption() -> list[Patch]:
    """A resumed request counts the positions of new tokens from its resumption on."""
    offsets: dict[int, int] = {}

    def start(self: Scheduler, plan: StepPlan, seq: Sequence, num_tokens: int) -> bool:
        started = real(self, plan, seq, num_tokens)
        if started:
            offsets[seq.row] = len(seq.token_ids) if seq.num_output_tokens else 0
        return started

    def change(self: ModelRunner, plan: StepPlan, batch: ForwardBatch) -> None:
        for i in range(plan.num_decodes):
            batch.positions[i] -= offsets.get(plan.rows[i], 0)

    real = Scheduler._start
    return [(Scheduler, "_start", start), *_changed_batch(change)]


@bad("every_token_is_that_of_hf", "across steps")
def rope_restarts_in_each_chunk() -> list[Patch]:
    """The second chunk of a prompt, or what follows a cached prefix, starts at position 0 again."""

    def change(self: ModelRunner, plan: StepPlan, batch: ForwardBatch) -> None:
        at = plan.num_decodes
        for i in range(plan.num_decodes, len(plan.rows)):
            batch.positions[at : at + plan.query_lens[i]] -= plan.starts[i]
            at += plan.query_lens[i]

    return _changed_batch(change)


@bad("every_token_is_that_of_hf", "off by one")
def the_head_reads_the_first_token_of_a_chunk() -> list[Patch]:
    """lm_head gets another position than the last one of a prompt."""

    def change(self: ModelRunner, plan: StepPlan, batch: ForwardBatch) -> None:
        first = batch.query_start_loc[:-1] + 1
        batch.query_start_loc = torch.cat((batch.query_start_loc[:1], first))

    return _changed_batch(change)


@bad("every_token_is_that_of_hf", "mistaken identity")
def decodes_read_each_others_tokens() -> list[Patch]:
    """The last tokens of a step's rows are taken in the order of the rows, not of the entries."""

    def change(self: ModelRunner, plan: StepPlan, batch: ForwardBatch) -> None:
        batch.token_ids[: plan.num_decodes] = self.last_tokens[
            sorted(plan.rows[: plan.num_decodes])
        ]

    return _changed_batch(change)


@bad("every_token_is_that_of_hf", "stale state", "6")
def a_block_table_keeps_a_stale_row() -> list[Patch]:
    """What the last owner of a row left in its block table stays there."""

    def update(self: ModelRunner, plan: StepPlan) -> None:
        before = self.block_tables.clone()
        real(self, plan)
        self.block_tables[:] = torch.where(before != 0, before, self.block_tables)

    real = ModelRunner._update_rows
    return [(ModelRunner, "_update_rows", update)]


@bad("every_token_is_that_of_hf", "stale state")
def a_row_keeps_the_last_owners_parameters() -> list[Patch]:
    """Temperature, filters and seed of a row are set once."""

    def update(self: ModelRunner, plan: StepPlan) -> None:
        fresh = [
            row for row in plan.new_rows if not self.__dict__.setdefault("seen", set()) & {row[0]}
        ]
        self.__dict__["seen"] |= {row[0] for row in plan.new_rows}
        with patch.object(plan, "new_rows", fresh):
            real(self, plan)

    real = ModelRunner._update_rows
    return [(ModelRunner, "_update_rows", update)]


@bad("replayed_graphs_change_nothing", "mistaken identity", "6")
def a_graph_is_padded_with_a_live_row() -> list[Patch]:
    """A batch between two buckets is filled up with row 0, which belongs to a request."""

    def init(self: cuda_graph.GraphRunner, *args: Any) -> None:
        real(self, *args)
        self.spare_row = 0

    real = cuda_graph.GraphRunner.__init__
    return [(cuda_graph.GraphRunner, "__init__", init)]


@bad("replayed_graphs_change_nothing", "stale state", "6")
def a_graph_replays_stale_rows() -> list[Patch]:
    """Rows and positions on the device are taken for current as long as the bucket is the same."""

    class BucketAlone(tuple[Any, ...]):
        def __ne__(self, other: object) -> bool:
            return not isinstance(other, tuple) or self[0] != other[0]

        __hash__ = tuple.__hash__

    def get(self: Any) -> Any:
        return self.__dict__.get("_on_device")

    def put(self: Any, value: Any) -> None:
        self.__dict__["_on_device"] = None if value is None else BucketAlone(value)

    return [(cuda_graph.GraphRunner, "on_device", property(get, put))]


# -- model -----------------------------------------------------------------------------------------


@bad("attention_is_its_definition", "across steps")
def a_chunk_has_no_causal_mask() -> list[Patch]:
    """Tokens of a chunk see those that come after them."""

    def prepare(self: attention.TorchAttention, batch: ForwardBatch) -> None:
        real(self, batch)
        for *_, mask in batch.attention[1]:
            if mask is not None:
                mask.fill_(True)

    real = attention.TorchAttention.prepare
    return [(attention.TorchAttention, "prepare", prepare)]


@bad("attention_is_its_definition", "off by one")
def a_decode_reads_past_its_end() -> list[Patch]:
    """The slots of a sequence's last block that it has not filled yet take part in attention."""

    def prepare(self: attention.TorchAttention, batch: ForwardBatch) -> None:
        real(self, batch)
        for *_, bias in batch.attention[0]:
            bias.zero_()

    real = attention.TorchAttention.prepare
    return [(attention.TorchAttention, "prepare", prepare)]


@bad("attention_is_its_definition", "mistaken identity")
def query_heads_read_the_wrong_kv_head() -> list[Patch]:
    """Query head h reads KV head h modulo their number, not h // group."""

    def attend(self: attention.TorchAttention, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        mixed = q.unflatten(1, (-1, self.num_kv_heads)).transpose(1, 2).flatten(1, 2)
        return (
            real(self, mixed, *rest)
            .unflatten(1, (self.num_kv_heads, -1))
            .transpose(1, 2)
            .flatten(1, 2)
        )

    real = attention.TorchAttention.attend
    return [(attention.TorchAttention, "attend", attend)]


@bad("kv_is_stored_in_its_slots_alone", "off by one")
def kv_of_the_last_token_is_not_stored() -> list[Patch]:
    """A store kernel with one program too few."""

    def store(
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        real(k[:-1], v[:-1], k_cache, v_cache, slots[:-1])

    real = kv_store.store_kv
    return [(kv_store, "store_kv", store), (rope, "store_kv", store)]


@bad("rope_scores_depend_on_distance_alone", "wrong formula")
def rope_rotates_keys_and_queries_apart() -> list[Patch]:
    """Interleaved pairs rotate one way, halves the other: a sign of the rotation is wrong."""

    def apply(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1).to(
            x.dtype
        )

    return [(rope, "apply_rope", apply)]


@bad("rms_norm_is_its_definition", "ownership", "9")
def rms_norm_writes_into_its_residual() -> list[Patch]:
    """`x.float()` of a float32 tensor is the tensor itself, and what follows is done in place."""

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return (
            wide.mul_(torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
        )

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return rms_norm(total, weight, eps), total

    return [(kernels, "rms_norm", rms_norm), (kernels, "add_rms_norm", add_rms_norm)]


@bad("rms_norm_is_its_definition", "what is asked does not arrive")
def the_norm_forgets_its_epsilon() -> list[Patch]:
    """An epsilon of 1e-6, whatever the model says."""

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return real(x, weight, 1e-6)

    real = norm.rms_norm
    return [(kernels, "rms_norm", rms_norm)]


@bad("swiglu_is_its_definition", "mistaken identity")
def gate_and_up_are_exchanged() -> list[Patch]:
    """silu is applied to the wrong half."""

    def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
        up, gate = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    return [(kernels, "silu_and_mul", silu_and_mul)]


@bad("config_files_are_read_as_they_are_written", "what is asked does not arrive", "9")
def rope_settings_of_newer_transformers_are_ignored() -> list[Patch]:
    """rope_theta is looked for at its old place alone, and is 10,000 where it is not there."""

    def read(file: Any) -> dict[str, Any]:
        raw = real(file)
        raw.pop("rope_parameters", None)
        return {"rope_theta": 10_000.0} | raw

    real = model_config.read_json
    return [(model_config, "read_json", read)]


# -- sampling --------------------------------------------------------------------------------------


def _changed_sampler(change: Callable[..., torch.Tensor]) -> list[Patch]:
    """change(real, logits, temperatures, ...) stands where the sampler is looked up: in the module
    and in the kernels' table.
    """
    real = sampling.sample

    def sample(*args: torch.Tensor, **flags: bool) -> torch.Tensor:
        return change(real, *args, **flags)

    return [(sampling, "sample", sample), (kernels, "sample", sample)]


@bad("frequencies_follow_the_filtered_softmax", "what is asked does not arrive")
def the_temperature_is_ignored() -> list[Patch]:
    """Every sampled row has temperature 1."""

    def change(
        real: Any,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        *rest: torch.Tensor,
        **flags: bool,
    ) -> torch.Tensor:
        return real(logits, (temperatures > 0).float(), *rest, **flags)

    return _changed_sampler(change)


@bad("filters_keep_what_they_say", "off by one")
def top_k_keeps_one_too_many() -> list[Patch]:
    """Top-k is off by one."""

    def filtered(
        logits: torch.Tensor, temperatures: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor
    ) -> torch.Tensor:
        return real(logits, temperatures, top_ks + (top_ks > 0), top_ps)

    real = filtering.filtered_logits
    return [(filtering, "filtered_logits", filtered)]


@bad("filters_keep_what_they_say", "off by one")
def top_p_keeps_one_too_few() -> list[Patch]:
    """The token with which the mass reaches p is dropped."""

    def filtered(
        logits: torch.Tensor, temperatures: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor
    ) -> torch.Tensor:
        kept = real(logits, temperatures, top_ks, top_ps)
        several = (kept > -torch.inf).sum(-1) > 1
        last = kept.masked_fill(kept == -torch.inf, torch.inf).argmin(-1)
        drop = several & (top_ps < 1)
        kept[drop, last[drop]] = -torch.inf
        return kept

    real = filtering.filtered_logits
    return [(filtering, "filtered_logits", filtered)]


@bad("frequencies_follow_the_filtered_softmax", "randomness")
def the_seed_repeats_at_every_position() -> list[Patch]:
    """The same random numbers for every token of a request. HF, rescored with them, sees nothing
    wrong.
    """

    def noise(seeds: torch.Tensor, positions: torch.Tensor, *rest: int) -> torch.Tensor:
        return real(seeds, torch.zeros_like(positions), *rest)

    real = sampling.gumbel_noise
    return [(sampling, "gumbel_noise", noise)]


@bad("seeds_tell_requests_apart", "randomness")
def half_of_the_seed_is_lost() -> list[Patch]:
    """Seeds that differ in their upper 32 bits alone give the same tokens."""

    def noise(seeds: torch.Tensor, positions: torch.Tensor, *rest: int) -> torch.Tensor:
        return real(seeds & 0xFFFFFFFF, positions, *rest)

    real = sampling.gumbel_noise
    return [(sampling, "gumbel_noise", noise)]


@bad("seeds_tell_requests_apart", "randomness")
def requests_without_a_seed_share_one() -> list[Patch]:
    """Every request that gives no seed gets the engine's."""

    def make(
        self: LLMEngine, request_id: str, prompt: Any, params: SamplingParams, number: int
    ) -> Sequence:
        seq = real(self, request_id, prompt, params, number)
        seq.seed = self.config.seed if params.seed is None else params.seed
        return seq

    real = LLMEngine.make_sequence
    return [(LLMEngine, "make_sequence", make)]


@bad("company_does_not_matter", "randomness")
def randomness_depends_on_the_row() -> list[Patch]:
    """The generator is seeded by the row of the batch, not by the request."""

    def change(
        real: Any,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        top_ks: Any,
        top_ps: Any,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        **flags: bool,
    ) -> torch.Tensor:
        return real(
            logits, temperatures, top_ks, top_ps, torch.arange(len(seeds)), positions, **flags
        )

    return _changed_sampler(change)


@bad("rows_of_a_batch_do_not_meet", "randomness")
def greedy_rows_get_noise_in_company() -> list[Patch]:
    """A greedy request beside sampled ones is sampled as well."""

    def change(
        real: Any,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        *rest: torch.Tensor,
        **flags: bool,
    ) -> torch.Tensor:
        mixed = (
            temperatures
            if flags["all_greedy"]
            else temperatures.masked_fill(temperatures == 0, 1.0)
        )
        return real(logits, mixed, *rest, **flags)

    return _changed_sampler(change)


@bad("frequencies_follow_the_filtered_softmax", "a path that only large inputs take")
def the_rest_of_a_large_batch_goes_unfiltered() -> list[Patch]:
    """Above 128 rows, top-k and top-p reach the first 128 alone."""

    def filtered(
        logits: torch.Tensor, temperatures: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor
    ) -> torch.Tensor:
        all_of_it = torch.zeros_like(top_ks), torch.ones_like(top_ps)
        rest = (torch.arange(len(logits)) >= 128).to(logits.device)
        kept = [torch.where(rest, a, b) for a, b in zip(all_of_it, (top_ks, top_ps), strict=True)]
        return real(logits, temperatures, *kept)

    real = filtering.filtered_logits
    return [(filtering, "filtered_logits", filtered)]


# -- tensor parallelism ----------------------------------------------------------------------------


@bad("two_ranks_compute_the_same", "ranks that disagree")
def a_rank_skips_the_all_reduce() -> list[Patch]:
    """Rank 1 goes on with its own part of the sum."""

    def all_reduce(self: Group, x: torch.Tensor) -> torch.Tensor:
        own = x.clone()
        total = real(self, x)
        return own if self.rank == 1 else total

    real = Group.all_reduce
    return [(Group, "all_reduce", all_reduce)]


@bad("two_ranks_compute_the_same", "mistaken identity")
def a_rank_loads_the_values_of_another() -> list[Patch]:
    """Every rank loads rank 0's share of the value projection."""

    def load(param: Any, part: str | None, source: Any, tp: Any, name: str) -> None:
        real(
            param, part, source, SimpleNamespace(rank=0, size=tp.size) if part == "v" else tp, name
        )

    real = loader._load
    return [(loader, "_load", load)]


@bad("ranks_hold_caches_of_one_size", "ranks that disagree", "7")
def ranks_size_their_caches_differently() -> list[Patch]:
    """Each rank takes as many blocks as fit into its own memory."""
    return [(Group, "agree_on_least", lambda self, value: value)]


@bad("a_lost_rank_leaves_nobody_hanging", "ranks that disagree", "7")
def a_lost_rank_is_waited_for() -> list[Patch]:
    """Collective operations wait for an hour."""
    return [(collectives, "timedelta", lambda seconds: timedelta(seconds=3600))]


@bad("engines_of_one_host_share_no_name", "mistaken identity", "7")
def ranks_meet_under_a_fixed_name() -> list[Patch]:
    """A second engine on the host meets the first one's ranks."""
    place = SimpleNamespace(
        name=os.path.join(tempfile.gettempdir(), "nanovllm-ranks"), cleanup=lambda: None
    )
    os.makedirs(place.name, exist_ok=True)
    return [(workers, "tempfile", SimpleNamespace(TemporaryDirectory=lambda **_: place))]


# -- requests and resources ------------------------------------------------------------------------


@bad("what_is_allowed_is_taken", "wrongly taken or refused", "8")
def temperature_zero_is_refused() -> list[Patch]:
    """Greedy sampling is an error."""

    def check(self: SamplingParams) -> None:
        real(self)
        if self.temperature < 1e-10:
            raise ValueError("temperature must be positive")

    real = SamplingParams.__post_init__
    return [(SamplingParams, "__post_init__", check)]


@bad("what_is_not_allowed_is_refused", "wrongly taken or refused", "8")
def max_tokens_zero_is_taken() -> list[Patch]:
    """A request for no tokens is accepted (and would never end)."""

    def check(self: SamplingParams) -> None:
        if self.max_tokens != 0:
            real(self)

    real = SamplingParams.__post_init__
    return [(SamplingParams, "__post_init__", check)]


@bad("an_impossible_request_is_refused", "wrongly taken or refused", "8")
def an_empty_prompt_is_taken() -> list[Patch]:
    """A prompt without tokens is silently given one."""

    def make(
        self: LLMEngine, request_id: str, prompt: Any, params: SamplingParams, number: int
    ) -> Sequence:
        return real(
            self,
            request_id,
            {"prompt_token_ids": prompt["prompt_token_ids"] or [0]},
            params,
            number,
        )

    real = LLMEngine.make_sequence
    return [(LLMEngine, "make_sequence", make)]


@bad("an_impossible_request_is_refused", "wrongly taken or refused", "8")
def a_long_prompt_is_cut() -> list[Patch]:
    """A prompt beyond max_model_len silently loses its head."""

    def make(
        self: LLMEngine, request_id: str, prompt: Any, params: SamplingParams, number: int
    ) -> Sequence:
        room = self.config.max_model_len - params.max_tokens
        return real(
            self,
            request_id,
            {"prompt_token_ids": prompt["prompt_token_ids"][-room:]},
            params,
            number,
        )

    real = LLMEngine.make_sequence
    return [(LLMEngine, "make_sequence", make)]


@bad("an_unknown_argument_is_an_error", "what is asked does not arrive", "8")
def unknown_arguments_are_dropped() -> list[Patch]:
    """Only the arguments that are known are passed on."""

    def from_kwargs(model: str, **kwargs: Any) -> EngineConfig:
        return EngineConfig(
            model=model,
            **{k: v for k, v in kwargs.items() if k in EngineConfig.__dataclass_fields__},
        )

    return [(EngineConfig, "from_kwargs", staticmethod(from_kwargs))]


@bad("the_cache_leaves_others_their_memory", "ownership", "10")
def the_cache_takes_what_others_hold() -> list[Patch]:
    """The cache is sized from the total memory, whatever is in use."""

    def num_blocks_for(config: Any, spec: KVCacheSpec) -> int:
        from nanovllm.engine import kv_cache

        _, total = kv_cache.memory_within(0, 0)
        return min(256 * 8, int(total * config.gpu_memory_utilization) // spec.block_bytes) or real(
            config, spec
        )

    real = model_runner.num_blocks_for
    return [(model_runner, "num_blocks_for", num_blocks_for)]


@bad("a_closed_engine_gives_everything_back", "ownership", "10")
def a_closed_engine_keeps_its_memory() -> list[Patch]:
    """close() ends the engine and drops nothing."""
    return [(ModelRunner, "close", lambda self: None)]


# -- options ---------------------------------------------------------------------------------------


@bad("options_give_the_tokens_of_hf", "what is asked does not arrive")
def the_repetition_penalty_forgets_the_prompt() -> list[Patch]:
    """Only tokens of the answer are penalized for repetition."""

    def of(spec: Any, vocab_size: int, device: Any) -> Any:
        state = real(spec, vocab_size, device)
        if state.in_prompt is not None:
            state.in_prompt = torch.zeros_like(state.in_prompt)
        return state

    real = logit_processors.RowState.of
    return [(logit_processors.RowState, "of", staticmethod(of))]


@bad("logits_are_edited_as_defined", "after a preemption")
def penalties_forget_the_answer_at_a_preemption() -> list[Patch]:
    """A request that starts again counts its tokens from zero."""

    def of(spec: Any, vocab_size: int, device: Any) -> Any:
        edits, num_prompt_tokens, token_ids = spec
        return real((edits, num_prompt_tokens, token_ids[:num_prompt_tokens]), vocab_size, device)

    real = logit_processors.RowState.of
    return [(logit_processors.RowState, "of", staticmethod(of))]


@bad("options_give_the_tokens_of_hf", "across steps")
def penalties_miss_the_last_token() -> list[Patch]:
    """The token of the step before is counted one step late."""

    def count(self: Any, token: torch.Tensor) -> None:
        late, self.edits = self.edits.get("late"), {**self.edits, "late": token.clone()}
        if late is not None:
            real(self, late)

    real = logit_processors.RowState.count
    return [(logit_processors.RowState, "count", count)]


@bad("options_give_the_tokens_of_hf", "what is asked does not arrive")
def min_tokens_is_ignored() -> list[Patch]:
    """An answer may end before it has min_tokens."""

    def edits_of(*args: Any) -> dict[str, Any]:
        return {name: edit for name, edit in real(*args).items() if name != "not_yet"}

    real = sequences.edits_of
    return [(sequences, "edits_of", edits_of)]


@bad("logits_are_edited_as_defined", "off by one")
def min_tokens_ends_one_early() -> list[Patch]:
    """The end of sequence is allowed as the last of min_tokens."""

    def edit(self: Any, logits: torch.Tensor, position: int) -> None:
        real(self, logits, position + 1)

    real = logit_processors.RowState.edit
    return [(logit_processors.RowState, "edit", edit)]


@bad("options_give_the_tokens_of_hf", "what is asked does not arrive")
def min_p_is_applied_before_the_temperature() -> list[Patch]:
    """min_p compares the probabilities at temperature 1."""

    def edits_of(params: Any, *rest: Any) -> dict[str, Any]:
        edits = real(params, *rest)
        if "min_p" in edits:
            edits["min_p"] = params.min_p, 1.0
        return edits

    real = sequences.edits_of
    return [(sequences, "edits_of", edits_of)]


@bad("logits_are_edited_as_defined", "what is asked does not arrive")
def a_bad_word_is_banned_by_its_last_token_alone() -> list[Patch]:
    """The tokens before the last one of a bad word are not compared."""

    def of(spec: Any, *rest: Any) -> Any:
        edits, *others = spec
        words = [word[-1:] for word in edits.get("bad_words", ())]
        return real(({**edits, **({"bad_words": words} if words else {})}, *others), *rest)

    real = logit_processors.RowState.of
    return [(logit_processors.RowState, "of", staticmethod(of))]


@bad("options_give_the_tokens_of_hf", "stale state")
def a_row_keeps_the_last_owners_options() -> list[Patch]:
    """A request without options inherits those of the row's last owner."""

    def renew(self: Any, rows: list[int], specs: list[Any]) -> None:
        some = [(row, spec) for row, spec in zip(rows, specs, strict=True) if spec is not None]
        real(self, [row for row, _ in some], [spec for _, spec in some])

    real = logit_processors.LogitProcessors.renew
    return [(logit_processors.LogitProcessors, "renew", renew)]


@bad("ranks_apply_options_alike", "mistaken identity")
def a_rank_takes_the_first_part_of_the_vocabulary() -> list[Patch]:
    """Every rank samples from the first part of the edited logits."""

    def edit(self: Any, logits: torch.Tensor, hidden: Any, plan: StepPlan) -> torch.Tensor:
        tp = self.runner.tp
        with patch.object(tp, "rank", 0) if self.specs else ExitStack():
            return real(self, logits, hidden, plan)

    real = logit_processors.LogitProcessors.edit
    return [(logit_processors.LogitProcessors, "edit", edit)]


@bad("options_give_the_tokens_of_hf", "stale state")
def a_graph_replays_requests_with_options() -> list[Patch]:
    """A decode with options is replayed from a CUDA graph, which knows nothing of them."""
    return [(logit_processors.LogitProcessors, "__contains__", lambda self, row: False)]


@bad("a_stop_string_ends_the_text", "across steps")
def a_stop_string_is_sought_in_the_new_text_alone() -> list[Patch]:
    """A stop string that begins in one token and ends in another is missed."""

    def add(self: Any, token_id: int) -> str | None:
        before, self.text = self.text, ""
        found = real(self, token_id)
        self.text = before + self.text
        return found

    real = stop_strings.StopStrings.add
    return [(stop_strings.StopStrings, "add", add)]


@bad("a_stop_string_ends_the_text", "what is asked does not arrive")
def a_stop_string_is_found_before_min_tokens() -> list[Patch]:
    """Stop strings count from the first token on."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **{**kwargs, "ignored_tokens": 0})

    real = stop_strings.StopStrings.__init__
    return [(stop_strings.StopStrings, "__init__", init)]


# -- quantization ----------------------------------------------------------------------------------


@bad("a_quantized_weight_is_its_definition", "mistaken identity")
def an_output_has_the_scale_of_the_next_one() -> list[Patch]:
    """Scales of output channels are off by one channel."""
    return [(quantized.Int8Weight, "_of", changed("scales", lambda of: of.roll(1, dims=-2)))]


@bad("a_quantized_weight_is_its_definition", "off by one")
def a_zero_point_is_one_too_high() -> list[Patch]:
    """As where a format stores zero points minus one, and the reader does not know."""
    return [(quantized.Int4Weight, "_of", changed("zeros", lambda of: of + 1))]


@bad("a_quantized_weight_is_its_definition", "wrong formula")
def groups_of_64_are_read_as_groups_of_128() -> list[Patch]:
    """Scales are made for 64 inputs each, and each is applied to 128."""

    def dequantized(self: Any, expert: int | None = None) -> torch.Tensor:
        self.reading = True
        try:
            return real(self, expert)
        finally:
            self.reading = False

    def groups(self: Any, device: torch.device) -> torch.Tensor:
        return of_64(self, device) // (2 if getattr(self, "reading", False) else 1)

    real, of_64 = quantized.Int4Weight.dequantized, quantized.Int4Weight._groups
    return [
        (quantized, "GROUP", 64),
        (quantized.Int4Weight, "dequantized", dequantized),
        (quantized.Int4Weight, "_groups", groups),
    ]


@bad("a_quantized_weight_is_its_definition", "mistaken identity")
def nibbles_are_swapped() -> list[Patch]:
    """The high four bits of a byte are taken for the even input."""
    swap = changed("packed", lambda of: of << 4 | of >> 4)
    return [(quantized.Int4Weight, "_of", swap)]


@bad("a_quantized_weight_is_its_definition", "off by one")
def the_last_group_is_dropped() -> list[Patch]:
    """A group that is not full counts nothing."""

    def dequantized(self: Any, expert: int | None = None) -> torch.Tensor:
        whole = real(self, expert)
        whole[..., self.inputs - self.inputs % quantized.GROUP :] = 0
        return whole

    real = quantized.Int4Weight.dequantized
    return [(quantized.Int4Weight, "dequantized", dequantized)]


@bad("a_quantized_weight_is_its_definition", "mistaken identity")
def a_rank_takes_the_groups_of_rank_0() -> list[Patch]:
    """Every rank counts groups from the first input of the whole weight."""

    def make(self: Any, wide: torch.Tensor) -> None:
        self.first_input = 0
        real(self, wide)

    real = quantized.Int4Weight._make
    return [(quantized.Int4Weight, "_make", make)]


@bad("a_quantized_weight_is_its_definition", "ranks that disagree")
def ranks_do_not_agree_on_scales() -> list[Patch]:
    """A rank scales by the largest of its own inputs."""
    return [(quantized.QuantizedWeight, "_largest", lambda self, values: values)]


@bad("a_quantized_weight_is_its_definition", "wrong formula")
def all_tokens_share_a_scale() -> list[Patch]:
    """Activations are rounded with the scale of the largest token of the batch."""

    def rounded(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, scales = real(self, x)
        scales = scales.amax(0, keepdim=True)
        return quantized.to_e4m3(x.float() / scales), scales

    real = quantized.Fp8Weight.rounded
    return [(quantized.Fp8Weight, "rounded", rounded)]


@bad("a_small_cache_is_its_definition", "wrong formula")
def values_are_read_without_their_scale() -> list[Patch]:
    """The scale of the cache is applied to keys alone."""

    def attend(self: Any, q: Any, k: Any, v: Any, keys: Any, values: Any, batch: Any) -> Any:
        plain = values._replace(scales=torch.ones_like(values.scales))
        return real(self, q, k, v, keys, plain, batch)

    real = small_cache.TorchAttentionOfStored.attend
    return [(small_cache.TorchAttentionOfStored, "attend", attend)]


@bad("a_small_cache_is_its_definition", "wrong formula")
def values_are_rounded_twice() -> list[Patch]:
    """Keys and values are rounded to bfloat16 before they are rounded to e4m3."""
    real = quantized.to_e4m3
    return [(small_cache, "to_e4m3", lambda wide: real(wide.bfloat16().float()))]


@bad("a_small_cache_is_its_definition", "wrong formula")
def what_is_too_large_does_not_saturate() -> list[Patch]:
    """Values beyond the range of e4m3 become NaN, as in a conversion that does not saturate."""

    def to_e4m3(wide: torch.Tensor) -> torch.Tensor:
        return torch.where(wide.abs() > 464, torch.nan, wide).to(torch.float8_e4m3fn)

    return [(small_cache, "to_e4m3", to_e4m3)]


@bad("a_small_cache_is_its_definition", "wrong formula")
def a_prompt_reads_its_own_keys_unrounded() -> list[Patch]:
    """Tokens of the step itself are attended to as they were computed, not as they are stored."""

    def store(self: Any, new: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
        real(self, new, slot_mapping)
        return new

    real = small_cache.Stored.store
    return [(small_cache.Stored, "store", store)]


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """QuantizedWeight._of, with another tensor under one name."""

    def of(self: Any, asked: str, expert: int | None) -> torch.Tensor:
        found = real(self, asked, expert)
        return change(found) if asked == name else found

    real = quantized.QuantizedWeight._of
    return of


# -- many clients ----------------------------------------------------------------------------------


@bad("every_client_gets_its_answer", "lost or repeated delivery")
def an_output_does_not_wake_its_reader() -> list[Patch]:
    """Outputs reach an event loop from another thread without waking it (asyncio's `call_soon`)."""
    return [(async_llm, "hand_over", lambda loop, call, *given: loop.call_soon(call, *given))]


@bad("every_client_gets_its_answer", "lost or repeated delivery")
def a_request_does_not_wake_the_engine() -> list[Patch]:
    """A request that comes while the step thread sleeps is queued, and the thread sleeps on."""

    def put(self: Any, command: Any) -> bool:
        with self._turn:
            self._commands.append(command)
        return True

    return [(step_thread.Inbox, "put", put)]


@bad("every_client_gets_its_answer", "lost or repeated delivery")
def an_output_is_delivered_twice() -> list[Patch]:
    """What a step yields reaches its reader twice, as where a delivery is repeated that seemed to
    have failed.
    """

    def deliver(self: Any, completion: Any) -> None:
        real(self, completion)
        if completion.finish_reason is None:
            real(self, completion)

    real = streams.Stream.deliver
    return [(streams.Stream, "deliver", deliver)]


@bad("every_client_gets_its_answer", "lost or repeated delivery")
def merged_outputs_lose_the_earlier_one() -> list[Patch]:
    """Where a reader is slow, the newest output takes the place of the one before, deltas too."""
    return [(streams, "merged", lambda earlier, later: later)]


@bad("every_client_gets_its_answer", "ownership")
def a_cancelled_request_keeps_its_blocks() -> list[Patch]:
    """When its reader goes away a request is forgotten, and runs on."""
    return [(step_thread.StepThread, "abort", lambda self, answers: None)]


@bad("every_client_gets_its_answer", "ownership")
def a_cancelled_request_keeps_its_place_in_the_queue() -> list[Patch]:
    """The place of a request is given back only if it was read to its end."""

    def close(self: Any, stream: Any) -> None:
        real(self, stream)
        self._num_unfinished += 0 if stream.is_complete else stream.num_answers

    real = async_llm.AsyncLLM._close
    return [(async_llm.AsyncLLM, "_close", close)]


@bad("every_client_gets_its_answer", "lost or repeated delivery")
def a_stream_ends_before_its_last_token() -> list[Patch]:
    """The end of a request overtakes the token that came with it."""

    def last(self: Any, reason: str) -> Any:
        completion = real(self, reason)
        completion.token_ids = completion.token_ids[:-1]
        return completion

    real = answers.Answer._last
    return [(answers.Answer, "_last", last)]


@bad("lower_priority_values_go_first", "order and fairness")
def higher_priority_values_go_first() -> list[Patch]:
    """The order is turned around."""

    def insert(order: list[Any], entry: Any) -> None:
        (value, arrival), _ = entry
        turned = [(-v, a) for (v, a), _ in order]
        order.insert(bisect.bisect_left(turned, (-value, arrival)), entry)

    def delete(self: Any, request_id: str) -> None:
        seq = self._seqs.pop(request_id)
        self._order.remove((self._ranks[request_id], request_id))
        if seq.finish_reason is not None:
            del self._ranks[request_id]

    return [(priority, "insort", insert), (priority.RankedQueue, "__delitem__", delete)]


@bad("lower_priority_values_go_first", "order and fairness")
def a_preempted_request_goes_to_the_front() -> list[Patch]:
    """As with first come, first served: it is admitted again before anyone else."""

    def move_to_end(self: Any, request_id: str, last: bool = True) -> None:
        self._order.remove((self._ranks[request_id], request_id))
        self._ranks[request_id] = (-1000, self._ranks[request_id][1])
        self._order.insert(0, (self._ranks[request_id], request_id))

    return [(priority.RankedQueue, "move_to_end", move_to_end)]


@bad("lower_priority_values_go_first", "order and fairness")
def the_youngest_gives_way_whatever_its_priority() -> list[Patch]:
    """A request of a low value is preempted because it was admitted last."""

    def lowest(self: Any) -> Any:
        found = [(self._ranks[request_id], request_id) for request_id in self._seqs]
        return found[-1] if found else None

    return [(priority.RankedQueue, "lowest", lowest)]
