"""Counters of what an engine did, which prove that a toggle did something. No torch."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class StepStats:
    """Cumulative counts since the engine started; they only ever grow. toggles/counters.py reads and
    resets them.
    """

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
