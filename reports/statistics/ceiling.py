"""The roofline bound of a workload: no engine of this kind can serve it faster on the hardware of a
profile.

The bound adds the time of two phases, each the slower of its memory traffic and its arithmetic
(Williams, Waterman and Patterson, "Roofline", CACM 2009):

    prefill_s = max(F_prefill / P, W / B)
    decode_s  = max((S W + K k) / B, F_decode / P)

    B  bytes/s of memory and P FLOP/s, as measured and written in the profile (per device, times the
    devices used)
    W  bytes of the weights a step reads once: every matrix of every layer and the output head (tied
    or not)
    S  decode steps: at least (longest output - 1) in each wave, since the first token of a request
    comes from prefill;
       at least D / M where the configuration lets M requests run at a time, D being the tokens that
       decode steps make; at least K / C where it limits the KV cache to C tokens, since a step
       reads only what is resident
    K  KV positions read: a request of p prompt and n output tokens attends to p + 1, ..., p + n - 1
    of them, one step
       after another. A prompt position that several requests of a wave share is read once a step
       for all of them (cascade attention), in at least as many steps as the longest of them takes
    k  bytes of keys and values of one position in all layers: 2 x layers x KV heads x head_dim x
    bytes per element F_prefill
       2 FLOP for each weight of the layers and each *distinct* prompt position (a prefix shared by
       several prompts is computed once, as a perfect prefix cache would), plus 4 x query heads x
       head_dim FLOP for each pair of positions in causal attention and layer, plus the head for the
       last position of each prompt
    F_decode
       the same for each generated token after the first, whose pairs are its own, shared or not

It assumes that prefill and decode do not overlap in time, that what a request generates is its own,
and the element size of the model's dtype for weights and cache. Activations, sampling, launches and
communication cost nothing here: what is above the bound is what an engine can still win.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

BYTES_PER_ELEMENT = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# One request: (prompt token ids, output tokens). A wave: requests that are served together.
Wave = Sequence[tuple[Sequence[int], int]]


@dataclass(frozen=True)
class ModelShape:
    """What the bound needs of a decoder with grouped-query attention and a gated MLP, or with the experts of one token."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    bytes_per_element: int

    @classmethod
    def of_plan(cls, model: Mapping[str, Any]) -> "ModelShape":
        """From the `model` part of a plan; keys of `shape` that the bound does not need are left
        alone.
        """
        shape = dict(model["shape"])
        if "num_experts" in shape:  # no step reads fewer of them than a token goes through
            shape["intermediate_size"] = (
                shape["num_experts_per_tok"] * shape["moe_intermediate_size"]
            )
        names = [name for name in cls.__dataclass_fields__ if name != "bytes_per_element"]
        missing = [name for name in names if name not in shape]
        if missing:
            raise ValueError(
                f"the plan's model shape lacks {', '.join(missing)}; the bound needs {', '.join(names)}"
            )
        if model["dtype"] not in BYTES_PER_ELEMENT:
            raise ValueError(
                f"dtype {model['dtype']!r} is unknown; known: {', '.join(BYTES_PER_ELEMENT)}"
            )
        return cls(
            **{name: shape[name] for name in names},
            bytes_per_element=BYTES_PER_ELEMENT[model["dtype"]],
        )

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of all layers (the norms, a few thousand elements, are left
        out).
        """
        attention = (
            2
            * (self.num_attention_heads + self.num_key_value_heads)
            * self.head_dim
            * self.hidden_size
        )
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def step_bytes(self) -> int:
        """W: bytes of weights that every step reads."""
        return (self.layer_weights + self.head_weights) * self.bytes_per_element

    @property
    def kv_bytes_per_token(self) -> int:
        """k: bytes of keys and values of one position in all layers."""
        return (
            2
            * self.num_hidden_layers
            * self.num_key_value_heads
            * self.head_dim
            * self.bytes_per_element
        )

    @property
    def attention_flops_per_pair(self) -> int:
        """Scores and weighted sum of one query position with one key position, in all layers: 4
        FLOP an element.
        """
        return 4 * self.num_hidden_layers * self.num_attention_heads * self.head_dim


@dataclass(frozen=True)
class Work:
    """The work that a workload requires of any engine, counted in tokens, positions and pairs of
    positions.
    """

    num_requests: int
    prompt_tokens: int
    distinct_prompt_tokens: int
    distinct_prompt_pairs: int
    output_tokens: int
    decode_tokens: int
    decode_pairs: int
    kv_tokens_read: int
    longest_decode: int

    @classmethod
    def of_waves(cls, waves: Sequence[Wave]) -> "Work":
        requests = [request for wave in waves for request in wave]
        shared = _already_there([prompt for prompt, _ in requests])
        # Longest answers first: what a request shares with one before it is read by that one in
        # every step of its own.
        by_length = [sorted(wave, key=lambda request: -request[1]) for wave in waves]
        reads = [
            zip(wave, _already_there([prompt for prompt, _ in wave]), strict=True)
            for wave in by_length
        ]
        return cls(
            num_requests=len(requests),
            prompt_tokens=sum(len(prompt) for prompt, _ in requests),
            distinct_prompt_tokens=sum(
                len(prompt) - s for (prompt, _), s in zip(requests, shared, strict=True)
            ),
            distinct_prompt_pairs=sum(
                pairs(len(prompt)) - pairs(s)
                for (prompt, _), s in zip(requests, shared, strict=True)
            ),
            output_tokens=sum(n for _, n in requests),
            decode_tokens=sum(n - 1 for _, n in requests),
            decode_pairs=sum((n - 1) * len(prompt) + pairs(n - 1) for prompt, n in requests),
            kv_tokens_read=sum(
                (n - 1) * (len(prompt) - s) + pairs(n - 1)
                for wave in reads
                for (prompt, n), s in wave
            ),
            longest_decode=sum(max(n for _, n in wave) - 1 for wave in waves if wave),
        )


@dataclass(frozen=True)
class Bound:
    """Least time of a workload and the most output tokens a second that follow, with the parts they
    are made of.
    """

    seconds: float
    tokens_per_s: float
    prefill_s: float
    decode_s: float
    decode_steps: int
    weight_bytes: int
    kv_bytes: int
    prefill_flops: int
    decode_flops: int
    decode_limit: str  # "memory" | "arithmetic"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bound(
    work: Work,
    shape: ModelShape,
    bandwidth_bytes_per_s: float,
    peak_flops: float,
    kv_cache_memory_bytes: float | None = None,
    devices: int = 1,
    max_num_seqs: int | None = None,
) -> Bound:
    """The bound of the module's docstring; bandwidth and peak per device, cache and max_num_seqs of
    all together.
    """
    if bandwidth_bytes_per_s <= 0 or peak_flops <= 0:
        raise ValueError(
            f"bandwidth {bandwidth_bytes_per_s} B/s and peak {peak_flops} FLOP/s must be greater than 0"
        )
    bandwidth, peak = bandwidth_bytes_per_s * devices, peak_flops * devices
    steps = max(
        work.longest_decode, ceil(work.decode_tokens / (max_num_seqs or work.num_requests or 1))
    )
    if kv_cache_memory_bytes:
        steps = max(
            steps, ceil(work.kv_tokens_read * shape.kv_bytes_per_token / kv_cache_memory_bytes)
        )
    weight_bytes = steps * shape.step_bytes
    kv_bytes = work.kv_tokens_read * shape.kv_bytes_per_token
    pair, linear, head = (
        shape.attention_flops_per_pair,
        2 * shape.layer_weights,
        2 * shape.head_weights,
    )
    prefill_flops = (
        work.distinct_prompt_tokens * linear
        + work.distinct_prompt_pairs * pair
        + work.num_requests * head
    )
    decode_flops = work.decode_tokens * (linear + head) + work.decode_pairs * pair
    prefill_s = max(prefill_flops / peak, shape.step_bytes / bandwidth)
    memory_s, arithmetic_s = (weight_bytes + kv_bytes) / bandwidth, decode_flops / peak
    seconds = prefill_s + max(memory_s, arithmetic_s)
    return Bound(
        seconds=seconds,
        tokens_per_s=work.output_tokens / seconds,
        prefill_s=prefill_s,
        decode_s=max(memory_s, arithmetic_s),
        decode_steps=steps,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        prefill_flops=prefill_flops,
        decode_flops=decode_flops,
        decode_limit="memory" if memory_s >= arithmetic_s else "arithmetic",
    )


def _already_there(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt, how many of its first tokens some prompt before it begins with as well.

    The rest of all prompts are the nodes of their prefix tree; of any subset, at most the nodes of
    that subset's tree.
    """
    seen: list[list[int]] = []  # sorted: what shares most with a prompt stands next to its place
    shared = []
    for prompt in map(list, prompts):
        place = bisect_left(seen, prompt)
        shared.append(
            max(
                (_common(prompt, other) for other in seen[max(place - 1, 0) : place + 1]), default=0
            )
        )
        seen.insert(place, prompt)
    return shared


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


def pairs(length: int) -> int:
    """Pairs of positions in causal attention: position i, counted from 1, sees i positions."""
    return length * (length + 1) // 2
