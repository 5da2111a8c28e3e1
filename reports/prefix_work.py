"""How much arithmetic the prefix cache saved in a recorded launch: its scheduler is run once more, without a model.

A record says how many prompt tokens were served from the cache, not which request they belonged to; attention's share of the
work depends on that. Planning needs no torch and no time, and nothing in it depends on the values of sampled tokens (of
a workload that runs every request to its full length), so a replay with the same settings makes the same steps. It is believed
only if it arrives at the very counters of the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from experiments import workloads
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import SamplingParams
from reports.ceiling import ModelShape, pairs

_CHECKED = ("steps", "prefill_tokens", "decode_tokens", "prefix_hit_tokens", "preemptions")
_NO_TOKEN = -1  # stands for whatever was sampled: in no vocabulary, so it never looks like a part of a prompt


class ReplayError(Exception):
    """The replay did not do what the record says; the message says where they part."""


@dataclass(frozen=True)
class Saved:
    """Of one launch and workload: prompt tokens and the FLOPs of computing them, all of them and those the cache spared;
    decode_flops: of everything after each request's first token, which no prefix cache can spare."""

    prompt_tokens: int
    cached_tokens: int
    prefill_flops: int
    spared_flops: int
    decode_flops: int

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    @property
    def of_prefill(self) -> float:
        """Share of the prefill's FLOPs."""
        return self.spared_flops / self.prefill_flops

    @property
    def of_all(self) -> float:
        """Share of all FLOPs."""
        return self.spared_flops / (self.prefill_flops + self.decode_flops)


def saved(record: Mapping[str, Any], plan: Mapping[str, Any], name: str) -> Saved:
    """What the cache spared a launch on workload `name`. Raises ReplayError where it cannot be told."""
    waves = workloads.rebuild(name, plan["workloads"][name])["waves"]
    cached, stats = _replay(waves, record["resolved"])
    counters = record["workloads"][name]["counters"]
    for counter in _CHECKED:
        if getattr(stats, counter) != counters[counter]:
            found = f"{counter} is {getattr(stats, counter):,} in the replay and {counters[counter]:,} in the record"
            raise ReplayError(f"{record['launch']} on {name}: {found}: the scheduler has changed since, or preempted by chance")
    shape = ModelShape.of_plan(plan["model"])
    linear, pair, head = 2 * shape.layer_weights, shape.attention_flops_per_pair, 2 * shape.head_weights
    requests = [(len(request["prompt_token_ids"]), request["max_tokens"]) for wave in waves for request in wave]
    return Saved(
        prompt_tokens=sum(prompt for prompt, _ in requests),
        cached_tokens=sum(cached),
        prefill_flops=sum(prompt * linear + pairs(prompt) * pair + head for prompt, _ in requests),
        spared_flops=sum(hit * linear + pairs(hit) * pair for hit in cached),
        decode_flops=sum(
            (output - 1) * (linear + head) + (pairs(prompt + output - 1) - pairs(prompt)) * pair for prompt, output in requests
        ),
    )


def _replay(waves: workloads.Waves, resolved: Mapping[str, Any]) -> tuple[list[int], StepStats]:
    """Cached prompt tokens of each request, waves in order, and the counters."""
    batching = resolved["optimizations"]["batching"]
    config: Any = SimpleNamespace(
        max_num_seqs=resolved["max_num_seqs"],
        max_num_batched_tokens=resolved["max_num_batched_tokens"],
        optimizations=SimpleNamespace(batching=batching),
    )
    stats = StepStats()
    blocks = CachingBlockManager(resolved["num_kv_blocks"], resolved["block_size"], stats)
    scheduler = (Scheduler if batching == "static" else ContinuousScheduler)(config, blocks, stats)
    cached = []
    for number, wave in enumerate(waves):
        sequences = [
            Sequence(f"{number}/{i}", list(request["prompt_token_ids"]), SamplingParams(max_tokens=request["max_tokens"]))
            for i, request in enumerate(wave)
        ]
        for sequence in sequences:
            scheduler.add(sequence)
        while (plan := scheduler.schedule()) is not None:
            scheduler.commit(plan, [_NO_TOKEN] * sum(plan.samples))
        cached += [sequence.num_cached_tokens for sequence in sequences]
    return cached, stats
