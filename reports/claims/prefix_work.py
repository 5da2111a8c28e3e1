"""How much arithmetic the prefix cache saved in a recorded launch: its scheduler is run once more,
without a model.

A record says how many prompt tokens were served from the cache, not which request they belonged to;
attention's share of the work depends on that. Planning needs no torch and no time, and nothing in
it depends on the values of sampled tokens (of a workload that runs every request to its full
length), so a replay with the same settings makes the same steps. It is believed only if it arrives
at the very counters of the record. Where it does not, because the scheduler has changed since, the
tokens are the record's and the FLOPs are bounded: least if all requests found the same number of
them, most if the longest found all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from experiments import workloads
from experiments.records.types import LaunchRecord, Plan
from nanovllm.config import Optimizations
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.sampling_params import SamplingParams
from reports.statistics.ceiling import ModelShape, pairs

_CHECKED = ("steps", "prefill_tokens", "decode_tokens", "prefix_hit_tokens", "preemptions")
# stands for whatever was sampled: in no vocabulary, so it never looks like a part of a prompt
_NO_TOKEN = -1


@dataclass(frozen=True)
class Saved:
    """One launch and workload: prompt tokens and the FLOPs of computing them, all of them and
    those the cache spared;
    decode_flops: of everything after each request's first token, which no prefix cache can spare.
    """

    prompt_tokens: int
    cached_tokens: int
    prefill_flops: int
    spared_flops: tuple[float, float]  # least and most; equal where the replay tells them
    decode_flops: int

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    @property
    def of_prefill(self) -> tuple[float, float]:
        """Share of the prefill's FLOPs, least and most."""
        return self.spared_flops[0] / self.prefill_flops, self.spared_flops[1] / self.prefill_flops

    @property
    def of_all(self) -> tuple[float, float]:
        """Share of all FLOPs, least and most."""
        every = self.prefill_flops + self.decode_flops
        return self.spared_flops[0] / every, self.spared_flops[1] / every


def saved(record: LaunchRecord, plan: Plan, name: str) -> Saved:
    """What the cache saved a launch on workload `name`."""
    waves = workloads.rebuild(name, plan["workloads"][name])["waves"]
    counters = record["workloads"][name]["counters"]
    hits = counters["prefix_hit_tokens"]
    cached, stats = _replay(waves, record["resolved"])
    shape = ModelShape.of_plan(plan["model"])
    linear, pair, head = (
        2 * shape.layer_weights,
        shape.attention_flops_per_pair,
        2 * shape.head_weights,
    )
    requests = [
        (len(request["prompt_token_ids"]), request["max_tokens"])
        for wave in waves
        for request in wave
    ]
    prompts = [prompt for prompt, _ in requests]
    # With overlap a request's last step is known to be its last one step late: there are a few
    # steps more than in the replay.
    checked = _CHECKED[1:] if record["resolved"]["optimizations"].get("overlap") else _CHECKED
    if all(getattr(stats, counter) == counters[counter] for counter in checked):
        found_pairs = (float(sum(map(pairs, cached))),) * 2
    else:
        found_pairs = _fewest_pairs(prompts, hits), _most_pairs(prompts, hits)
    return Saved(
        prompt_tokens=sum(prompts),
        cached_tokens=hits,
        prefill_flops=sum(prompt * linear + pairs(prompt) * pair + head for prompt, _ in requests),
        spared_flops=(hits * linear + found_pairs[0] * pair, hits * linear + found_pairs[1] * pair),
        decode_flops=sum(
            (output - 1) * (linear + head) + (pairs(prompt + output - 1) - pairs(prompt)) * pair
            for prompt, output in requests
        ),
    )


def _fewest_pairs(prompts: list[int], hits: int) -> float:
    """Pairs of positions within the cached tokens if every request found the same number: pairs are
    convex in it.
    """
    each = hits / len(prompts)
    return len(prompts) * each * (each + 1) / 2


def _most_pairs(prompts: list[int], hits: int) -> float:
    """The same if the longest prompts found all but their last token."""
    found = 0
    for prompt in sorted(prompts, reverse=True):
        hit = min(prompt - 1, hits)
        hits -= hit
        found += pairs(hit)
    return float(found)


def _replay(waves: workloads.Waves, resolved: Mapping[str, Any]) -> tuple[list[int], StepStats]:
    """Cached prompt tokens of each request, waves in order, and the counters."""
    batching = resolved["optimizations"]["batching"]
    config: Any = SimpleNamespace(
        max_num_seqs=resolved["max_num_seqs"],
        max_num_batched_tokens=resolved["max_num_batched_tokens"],
        optimizations=Optimizations(**resolved["optimizations"]),
    )
    stats = StepStats()
    blocks = CachingBlockManager(resolved["num_kv_blocks"], resolved["block_size"], stats)
    scheduler = (Scheduler if batching == "static" else ContinuousScheduler)(config, blocks, stats)
    cached = []
    for number, wave in enumerate(waves):
        sequences = [
            Sequence(
                f"{number}/{i}",
                list(request["prompt_token_ids"]),
                SamplingParams(max_tokens=request["max_tokens"]),
            )
            for i, request in enumerate(wave)
        ]
        for sequence in sequences:
            scheduler.add(sequence)
        while (plan := scheduler.schedule()) is not None:
            scheduler.commit(plan, [_NO_TOKEN] * sum(plan.samples))
        cached += [sequence.num_cached_tokens for sequence in sequences]
    return cached, stats
