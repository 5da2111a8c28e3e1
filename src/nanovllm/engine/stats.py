"""Counters of what an engine did, which prove that a toggle did something. No torch."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class StepStats:
    """Cumulative counts since the engine started; they only ever grow."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    mixed_steps: int = 0  # steps in which prefill chunks shared the batch with decodes
    partial_prefills: int = 0  # chunks that did not finish their prompt
    admissions: int = 0
    refills: int = 0  # admissions while other requests were running
    # steps planned by each batching policy
    policy_steps: Counter[str] = field(default_factory=Counter)
    prefix_lookup_tokens: int = 0
    prefix_hit_tokens: int = 0
    # found again by a preempted request, mostly its own blocks: not counted as hits
    prefix_refound_tokens: int = 0
    prefix_evictions: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0  # known tokens whose KV was computed again after a preemption
    discarded_tokens: int = 0  # sampled for a request that had already ended (commit lag 1, aborts)
    overlapped_steps: int = 0  # submitted while another step was in flight
    graph_replays: int = 0
    # sums over tensor-parallel ranks, by implementation
    all_reduces: Counter[str] = field(default_factory=Counter)
    # by backend; 'cascade': steps that looked for shared prefixes, 'shared': steps that found some
    attention_calls: Counter[str] = field(default_factory=Counter)
    kernel_calls: Counter[str] = field(default_factory=Counter)  # by implementation

    def reset(self) -> None:
        """Sets all counters to zero in place, as other objects hold them."""
        for name, value in self._items():
            value.clear() if isinstance(value, Counter) else setattr(self, name, 0)

    def flat(self) -> dict[str, int]:
        """All counters as `name` or `name.key`, JSON-able."""
        split = {
            f"{name}.{key}": n[key]
            for name, n in self._items()
            if isinstance(n, Counter)
            for key in sorted(n)
        }
        return {name: n for name, n in self._items() if not isinstance(n, Counter)} | split

    def _items(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]
