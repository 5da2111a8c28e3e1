"""scheduling_policy='priority': requests of a lower value are served first, and preempted last.
Loaded when asked for. No torch.

As in vLLM, the policy orders who is admitted, who gets the token budget, and who gives way when the
KV cache is full: the request of the highest value, of equal ones the one that arrived last. A
waiting request does not stop a running one.

The scheduler stays what it is. Its queues, which are ordered by age, are replaced by queues that
are ordered by (priority, arrival); so "oldest" in its comments reads "first in that order". The
first of all requests always advances.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

Rank = tuple[int, int]
"""Priority and arrival."""


class RankedQueue(MutableMapping[str, Sequence]):
    """Sequences by request id, in the order of their ranks. Adding and removing cost a binary search
    and the shift of a list of pointers.
    """

    def __init__(self, ranks: dict[str, Rank]) -> None:
        self._ranks = ranks  # of every unfinished request, in whichever queue it is
        self._seqs: dict[str, Sequence] = {}
        self._order: list[tuple[Rank, str]] = []

    def __setitem__(self, request_id: str, seq: Sequence) -> None:
        if request_id not in self._seqs:
            insort(self._order, (self._ranks[request_id], request_id))
        self._seqs[request_id] = seq

    def __getitem__(self, request_id: str) -> Sequence:
        return self._seqs[request_id]

    def __delitem__(self, request_id: str) -> None:
        seq = self._seqs.pop(request_id)
        del self._order[bisect_left(self._order, (self._ranks[request_id], request_id))]
        if seq.finish_reason is not None:
            del self._ranks[request_id]

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._seqs

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[str]:
        return (request_id for _, request_id in self._order)

    def move_to_end(self, request_id: str, last: bool = True) -> None:
        """A preempted request is already where its rank puts it."""

    def lowest(self) -> tuple[Rank, str] | None:
        """The rank and the id of the last in order; None where the queue is empty."""
        return self._order[-1] if self._order else None


def prioritize(scheduler: Scheduler) -> Callable[[Any], None]:
    """Makes a scheduler without requests serve by priority. Returns what adds a request: a function
    of an object that has a sequence, `seq`, and its `rank`. It raises what Scheduler.add raises.

    Raises ValueError for a scheduler with static batching, which preempts nobody.
    """
    if not isinstance(scheduler, ContinuousScheduler):
        raise ValueError(
            "scheduling_policy='priority' needs batching 'continuous' or 'chunked': with 'static' no request is "
            "admitted before all running ones have finished"
        )
    ranks: dict[str, Rank] = {}
    running = RankedQueue(ranks), RankedQueue(ranks)
    queues: Any = scheduler
    queues.waiting, (queues.prefilling, queues.decoding) = RankedQueue(ranks), running

    def victim() -> tuple[RankedQueue, Sequence]:
        _, request_id = max(filter(None, (queue.lowest() for queue in running)))
        queue = running[0] if request_id in running[0] else running[1]
        return queue, queue[request_id]

    def add(answer: Any) -> None:
        seq = answer.seq
        known = seq.request_id in ranks
        ranks.setdefault(seq.request_id, answer.rank)
        try:
            scheduler.add(seq)
        except ValueError:
            if not known:
                del ranks[seq.request_id]
            raise

    queues.victim = victim
    return add
