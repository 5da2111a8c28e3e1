"""What the engines are asked to do: seeded, fingerprinted lists of requests. Standard library only.

A plan stores `kind`, `params` and `fingerprint`, never tokens: whoever runs it draws them again and
compares the fingerprint. Everything is drawn before an engine is imported, from a generator of its
own, so no engine can disturb it.

A range is written `[low, high]`, both ends included; a single number n means `[n, n]`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]
Waves = list[list[Request]]

CANONICAL_FINGERPRINT = "ba5158017eff74f36be1d0f9bfaee7bf39eb88f70fa50fa8aea820ce1e2bd513"
"""Of the canonical workload with its default parameters, as published."""

_SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "ignore_eos": True}

DEFAULTS: dict[str, dict[str, Any]] = {
    "canonical": {
        "num_requests": 256,
        "prompt_tokens": [100, 1024],
        "output_tokens": [100, 1024],
        "vocab_size": 10_001,
        "seed": 0,
    },
    "random": {
        "num_requests": 64,
        "prompt_tokens": [12, 128],
        "output_tokens": [12, 128],
        "vocab_size": 2_048,
        "seed": 0,
    },
    "shared_prefix": {
        "num_prefixes": 4,
        "prefix_tokens": 256,
        "num_requests": 32,
        "own_tokens": [16, 32],
        "output_tokens": [4, 16],
        "vocab_size": 2_048,
        "seed": 0,
    },
    "conversation": {
        "num_conversations": 16,
        "turns": 4,
        "system_tokens": 128,
        "user_tokens": [16, 64],
        "answer_tokens": [16, 64],
        "vocab_size": 2_048,
        "seed": 0,
    },
}
"""Every parameter of every kind, with its default. The sampling parameters (`_SAMPLING`) belong to each kind as well."""
for _defaults in DEFAULTS.values():
    _defaults.update(_SAMPLING)

_RANGES = {
    "prompt_tokens",
    "output_tokens",
    "prefix_tokens",
    "own_tokens",
    "system_tokens",
    "user_tokens",
    "answer_tokens",
}
_MAY_BE_ZERO = {"system_tokens"}
MOST_OF = 1_000_000
"""Requests, prefixes, turns, and tokens of each: what is drawn is held in memory, and counted before anything runs."""
MOST = {"seed": 2**63 - 1, "top_k": 2**31 - 1, "vocab_size": 2**31 - 1}


def check_params(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """`params` completed by the defaults of `kind`. Raises ValueError naming what was given and
    what is allowed.
    """
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(f"kind: {kind!r} is unknown; allowed: {', '.join(DEFAULTS)}")
    defaults = DEFAULTS[kind]
    if unknown := sorted(set(params) - set(defaults), key=str):
        raise ValueError(
            f"{unknown[0]}: unknown parameter of kind {kind}; allowed: {', '.join(defaults)}"
        )
    full = defaults | params
    for name, value in full.items():
        if name in _RANGES:
            full[name] = _check_range(name, value, 0 if name in _MAY_BE_ZERO else 1)
        elif name == "ignore_eos":
            _require(isinstance(value, bool), name, value, "true or false")
        elif name in ("temperature", "top_p"):
            _require(
                isinstance(value, (int, float)) and not isinstance(value, bool),
                name,
                value,
                "a number",
            )
        else:
            low, high = 0 if name in ("seed", "top_k") else 1, MOST.get(name, MOST_OF)
            _require(
                _is_int(value) and low <= value <= high,
                name,
                value,
                f"a whole number from {low} to {high}",
            )
    greedy = full["temperature"] == 0  # the bounds are those of the engine's SamplingParams
    _require(
        greedy or 1e-5 <= full["temperature"] <= 1e30,
        "temperature",
        full["temperature"],
        "0 (greedy), or from 1e-5 to 1e30",
    )
    _require(1e-30 <= full["top_p"] <= 1, "top_p", full["top_p"], "in (0, 1], no less than 1e-30")
    _require(full["vocab_size"] >= 2, "vocab_size", full["vocab_size"], "2 or more")
    return full


def build(name: str, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """The workload as the contract has it: name, kind, complete params, fingerprint and waves of
    requests.
    """
    full = check_params(kind, params)
    waves = _GENERATORS[kind](full)
    return {
        "name": name,
        "kind": kind,
        "params": full,
        "fingerprint": fingerprint(waves),
        "waves": waves,
    }


def rebuild(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Draws the workload of a plan's entry again. Raises ValueError if its fingerprint is not the
    plan's.
    """
    workload = build(name, entry["kind"], entry["params"])
    if workload["fingerprint"] != entry["fingerprint"]:
        raise ValueError(
            f"workload {name!r}: the tokens drawn here have fingerprint {workload['fingerprint']}, the plan asks for "
            f"{entry['fingerprint']}. The plan was made by another version of experiments/workloads.py: make it again."
        )
    return workload


def summarize(workload: dict[str, Any]) -> dict[str, Any]:
    """What a plan stores of a workload: no tokens."""
    requests = [request for wave in workload["waves"] for request in wave]
    return {
        "kind": workload["kind"],
        "params": workload["params"],
        "fingerprint": workload["fingerprint"],
        "num_requests": len(requests),
        "prompt_tokens": sum(len(r["prompt_token_ids"]) for r in requests),
        "output_tokens": sum(r["max_tokens"] for r in requests),
    }


def fingerprint(waves: Waves) -> str:
    """SHA-256 of all prompts and output lengths, waves in order; sampling parameters are not part
    of it.
    """
    requests = [request for wave in waves for request in wave]
    content = {
        "output_lengths": [r["max_tokens"] for r in requests],
        "prompt_token_ids": [r["prompt_token_ids"] for r in requests],
    }
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def tokens_digest(outputs: list[list[int]]) -> str:
    """SHA-256 of the JSON of all outputs in the order of the requests."""
    return hashlib.sha256(json.dumps(outputs, separators=(",", ":")).encode()).hexdigest()


def _canonical(p: dict[str, Any]) -> Waves:
    """Published by nano-vllm's bench.py: prompt by prompt (length, then tokens), then all output
    lengths.
    """
    rng = random.Random(p["seed"])
    prompts = [_tokens(rng, rng.randint(*p["prompt_tokens"]), p) for _ in range(p["num_requests"])]
    lengths = [rng.randint(*p["output_tokens"]) for _ in range(p["num_requests"])]
    return [_requests(prompts, lengths, p)]


def _shared_prefix(p: dict[str, Any]) -> Waves:
    """Request i begins with one of the prefixes, drawn at random, and goes on with tokens of its
    own.
    """
    rng = random.Random(p["seed"])
    prefixes = [_tokens(rng, rng.randint(*p["prefix_tokens"]), p) for _ in range(p["num_prefixes"])]
    prompts = [
        rng.choice(prefixes) + _tokens(rng, rng.randint(*p["own_tokens"]), p)
        for _ in range(p["num_requests"])
    ]
    lengths = [rng.randint(*p["output_tokens"]) for _ in range(p["num_requests"])]
    return [_requests(prompts, lengths, p)]


def _conversation(p: dict[str, Any]) -> Waves:
    """One wave a turn. A prompt holds the system prompt and all earlier turns; the earlier answers
    are *recorded* ones,
    drawn here: what the engine answered itself is not fed back, so every engine serves the same
    work.
    """
    rng = random.Random(p["seed"])
    system = _tokens(rng, rng.randint(*p["system_tokens"]), p)
    histories = [list(system) for _ in range(p["num_conversations"])]
    waves: Waves = []
    for turn in range(p["turns"]):
        for history in histories:
            history += _tokens(rng, rng.randint(*p["user_tokens"]), p)
        answers = [_tokens(rng, rng.randint(*p["answer_tokens"]), p) for _ in histories]
        waves.append(
            _requests(
                [list(h) for h in histories], [len(a) for a in answers], p, turn * len(histories)
            )
        )
        for history, answer in zip(histories, answers, strict=True):
            history += answer
    return waves


_GENERATORS: dict[str, Callable[[dict[str, Any]], Waves]] = {
    "canonical": _canonical,
    "random": _canonical,  # the same draws at another scale
    "shared_prefix": _shared_prefix,
    "conversation": _conversation,
}


def _tokens(rng: random.Random, count: int, p: dict[str, Any]) -> list[int]:
    return [rng.randint(0, p["vocab_size"] - 1) for _ in range(count)]


def _requests(
    prompts: list[list[int]], lengths: list[int], p: dict[str, Any], first_index: int = 0
) -> list[Request]:
    sampling = {name: p[name] for name in _SAMPLING}
    return [
        {
            "prompt_token_ids": prompt,
            "max_tokens": length,
            **sampling,
            "seed": _request_seed(p["seed"], first_index + i),
        }
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def _request_seed(seed: int, index: int) -> int:
    """A seed of 31 bits for each request, drawn apart from the tokens so that it leaves the
    fingerprint alone.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "big") >> 1


def _check_range(name: str, value: Any, least: int) -> list[int]:
    if _is_int(value):
        value = [value, value]
    allowed = f"a whole number or [low, high] with {least} <= low <= high <= {MOST_OF}"
    _require(
        isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_int, value)),
        name,
        value,
        allowed,
    )
    _require(least <= value[0] <= value[1] <= MOST_OF, name, value, allowed)
    return list(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {value!r} is not allowed; allowed: {allowed}")
