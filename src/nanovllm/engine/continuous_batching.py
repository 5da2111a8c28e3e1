"""batching=continuous and chunked: requests join and leave between any two steps. Loaded only when on. No torch.

    continuous  admit whenever there is room; a step is all prefill (first) or all decode         (Orca, OSDI'22)
    chunked     admit whenever there is room; decodes first, prefill chunks fill the token budget (Sarathi-Serve, OSDI'24)

Only the KV of known tokens is claimed at admission, so memory can run out. Then the youngest running request is preempted:
it gives its row and blocks back, goes to the head of the waiting queue and computes its KV again later (vLLM's recomputation).
The oldest is never the victim of a younger one, so it always advances and nobody starves.
"""

from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence


class ContinuousScheduler(Scheduler):
    """The interface of Scheduler; config.optimizations.batching says which of the two policies."""

    def _admit(self, plan: StepPlan) -> None:
        """Oldest first, as far as rows, blocks and the token budget of the next step go."""
        planned = sum(seq.num_to_schedule for seq in self.prefilling.values())
        refill = bool(self.prefilling or self.decoding)
        while self.waiting and self.free_rows and planned < self.config.max_num_batched_tokens:
            seq = next(iter(self.waiting.values()))
            if seq.in_flight or not self._start(plan, seq, len(seq.token_ids)):
                break  # a preempted request waits for its own token; a younger one must not overtake the oldest
            planned += seq.num_to_schedule
            self.stats.refills += refill
            self.stats.recomputed_tokens += seq.num_to_schedule if seq.num_output_tokens else 0

    def _fill(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        if self.policy == "chunked":
            self._plan_decodes(plan, seqs)
            self._plan_prefills(plan, seqs)
        else:
            super()._fill(plan, seqs)

    def _grow(self, plan: StepPlan, seq: Sequence) -> bool:
        """Preempts the youngest requests until a block is free; False if `seq` itself was the youngest."""
        while self.blocks.num_free == 0:
            queue = self.prefilling or self.decoding
            victim = next(reversed(queue.values()))
            self._leave(victim, queue)  # its known tokens stay with it; those in flight are still committed
            self.waiting[victim.request_id] = victim
            self.waiting.move_to_end(victim.request_id, last=False)
            self.stats.preemptions += 1
            if victim is seq:
                return False
        block = self.blocks.allocate(1)[0]
        plan.new_blocks.append((seq.row, len(seq.block_table), block))
        seq.block_table.append(block)
        return True
