"""batching=continuous and chunked: requests join and leave between any two steps. Loaded only when
on. No torch.

    continuous  admit whenever there is room; a step is all prefill (first) or all decode         (Orca, OSDI'22)
    chunked     admit whenever there is room; decodes first, prefill chunks fill the token budget (Sarathi-Serve, OSDI'24)

Only the KV of known tokens is claimed at admission; admission.py estimates whether the request can
finish. If it was wrong and memory runs out, the youngest running request is preempted: it gives its
row and blocks back, moves to the head of the waiting queue and computes its KV again later (vLLM's
recomputation), except for what the prefix cache still holds. A request is never preempted for a
younger one, so the oldest always advances and nobody starves.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from nanovllm.config import ResolvedConfig
from nanovllm.engine.admission import GATHERED, Forecast
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats


class ContinuousScheduler(Scheduler):
    """The interface of Scheduler; config.optimizations.batching says which of the two policies
    runs.
    """

    def __init__(self, config: ResolvedConfig, blocks: BlockManager, stats: StepStats) -> None:
        super().__init__(config, blocks, stats)
        self.forecast = Forecast(blocks)
        # keys that are being computed, with a prefix cache
        self.coming: Callable[..., set[int]] = getattr(blocks, "coming", lambda _: set())
        # how many were running and waiting when nobody could be admitted, so that an unchanged
        # situation is not examined again
        self.found_full = (0, 0)

    def _admit(self, plan: StepPlan) -> None:
        """Admits waiting requests, oldest first, as long as there are rows and blocks,
        admission.py predicts that they fit, and the next step has token budget left. A request
        whose prefix is being computed by another request waits until that prefix is cached.
        """
        running = [*self.prefilling.values(), *self.decoding.values()]
        if not self.waiting or (len(running), len(self.waiting)) == self.found_full:
            return
        if running and not self._room_for_some(running):
            self.found_full = (len(running), len(self.waiting))
            return
        planned, refill = (
            sum(seq.num_to_schedule for seq in self.prefilling.values()),
            bool(running),
        )
        at_most, capacity = (
            sum(map(self.forecast.longest, running)),
            self.blocks.num_blocks * self.blocks.block_size,
        )
        coming, held = self.coming(running), []
        while self.waiting and self.free_rows and planned < self.config.max_num_batched_tokens:
            seq = next(iter(self.waiting.values()))
            if seq.in_flight:
                # a preempted request waits for its own token; a younger one must not overtake it
                break
            if coming and not seq.num_output_tokens and self.blocks.had_better_wait(seq, coming):  # type: ignore[attr-defined]
                held.append(self.waiting.pop(seq.request_id))
                if len(held) < self.config.max_num_seqs:
                    continue
                break  # look at a bounded number, however many wait
            at_most += self.forecast.longest(seq)
            if running and at_most > capacity and not self.forecast.fits(running, [seq]):
                break
            if not self._start(plan, seq, len(seq.token_ids)):
                break
            running.append(seq)
            coming |= self.coming([seq])
            planned += seq.num_to_schedule
            self.stats.refills += refill
            self.stats.recomputed_tokens += max(0, seq.num_lost - seq.num_scheduled)
        for seq in reversed(held):
            self.waiting[seq.request_id] = seq
            self.waiting.move_to_end(seq.request_id, last=False)

    def _room_for_some(self, running: list[Sequence]) -> bool:
        """Whether it is worth admitting now although the step then cannot be replayed from a CUDA
        graph: all waiting requests can join, or enough of them.
        """
        enough = max(1, len(running) // GATHERED) if self.config.optimizations.cuda_graphs else 1
        first = list(islice(self.waiting.values(), enough))
        return len(first) <= len(self.free_rows) and self.forecast.fits(running, first)

    def _leave(self, seq: Sequence, queue: OrderedDict[str, Sequence]) -> None:
        super()._leave(seq, queue)
        self.found_full = (0, 0)
        if seq.finish_reason in ("stop", "length"):
            self.forecast.finished(seq)

    def _fill(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        if self.config.optimizations.batching == "chunked":
            self._plan_decodes(plan, seqs)
            self._plan_prefills(plan, seqs)
        else:
            super()._fill(plan, seqs)

    def _plan_decodes(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        for seq in list(self.decoding.values()):
            if seq.row < 0 or not seq.wants_more:
                continue  # preempted by an older one in this loop; or its last token is in flight
            has_room = seq.num_scheduled < len(seq.block_table) * self.blocks.block_size
            if has_room or self._grow(plan, seq):
                self._plan_entry(plan, seqs, seq, 1, samples=True)
        plan.num_decodes = len(seqs)

    def _grow(self, plan: StepPlan, seq: Sequence) -> bool:
        """Preempts the youngest requests until a block is free; False if `seq` itself was the
        youngest.
        """
        while self.blocks.num_free == 0:
            queue, victim = self.victim()
            victim.num_lost = victim.num_scheduled
            # it keeps its known tokens; those in flight will still be committed
            self._leave(victim, queue)
            self.waiting[victim.request_id] = victim
            self.waiting.move_to_end(victim.request_id, last=False)
            self.stats.preemptions += 1
            if victim is seq:
                return False
        block = self.blocks.allocate(1)[0]
        plan.new_blocks.append((seq.row, len(seq.block_table), block))
        seq.block_table.append(block)
        return True

    def victim(self) -> tuple[OrderedDict[str, Sequence], Sequence]:
        """The youngest running request, and the queue that it is in."""
        queue = self.prefilling or self.decoding
        return queue, next(reversed(queue.values()))
