"""Workloads: seeded, fingerprinted lists of requests. Standard library only.

A plan stores `kind`, `params` and `fingerprint`, but no tokens: they are drawn again for each launch
and the fingerprint is compared. Everything is drawn before an engine is imported, from a separate
random generator, so that no engine can affect it.

A range is written `[low, high]`, both ends included; a single number n means `[n, n]`.

The kind `file` is read from a file of JSON lines (workload_files.py); what the file said is then the
parameter `content`, so that a plan needs the file no more.

Without `arrivals`, all requests of a wave arrive together. With them (experiments/load/arrivals.py),
and in workloads of kind `trace`, each request has a due time; the fingerprint holds it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from experiments import workload_files
from experiments.load import arrivals, traces
from experiments.records.types import (
    Params,
    PlannedWorkload,
    Request,
    Schedule,
    Wave,
    Workload,
)

Waves = list[Wave]

CANONICAL_FINGERPRINT = "ba5158017eff74f36be1d0f9bfaee7bf39eb88f70fa50fa8aea820ce1e2bd513"
"""The fingerprint of the canonical workload with default parameters, as published."""

_SAMPLING: Params = {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "ignore_eos": True}

MOST_OF = 1_000_000
"""The largest number of requests, prefixes, turns, and tokens of each, because workloads are held in memory."""

DEFAULTS: dict[str, Params] = {
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
    "file": {
        "path": "everyday",
        "content": None,
        "num_requests": None,
        "as_chat": False,
        "default_output_tokens": 64,
        "seed": 0,
    },
}
"""All parameters of each kind, with defaults. Every kind also has the sampling parameters, `_SAMPLING`."""
TRACE: Params = {
    "path": "",
    "sha256": "",
    "num_requests": MOST_OF,
    "speed": 1.0,
    "max_prompt_tokens": MOST_OF,
    "max_output_tokens": MOST_OF,
    "block_tokens": 512,
    "shrink": 1,
    "vocab_size": 2_048,
    "seed": 0,
}
"""The parameters of kind `trace`, which replays a file of experiments/load/traces.py. num_requests:
the first so many; speed: 2 replays in half the time; max_*: longer ones are cut; block_tokens: prompt
tokens per hash id; shrink: all lengths, those of blocks too, are divided by it and rounded up;
sha256: filled in, and checked where it is given."""
for _defaults in (*DEFAULTS.values(), TRACE):
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
MOST = {"seed": 2**63 - 1, "top_k": 2**31 - 1, "vocab_size": 2**31 - 1}


def check_params(kind: str, params: Params) -> Params:
    """`params` completed with the defaults of `kind`. Raises ValueError that names what was given
    and what is allowed.
    """
    if not isinstance(kind, str) or (kind not in DEFAULTS and kind != "trace"):
        raise ValueError(f"kind: {kind!r} is unknown; allowed: {', '.join(DEFAULTS)}, trace")
    if kind == "trace":
        defaults = TRACE
        params = _check_trace(params)
    else:
        defaults = DEFAULTS[kind]
        if "arrivals" in params:
            checked = arrivals.check(params["arrivals"], sessions=kind == "conversation")
            rest = {name: value for name, value in params.items() if name != "arrivals"}
            full = check_params(kind, rest)
            if "answers" in checked:
                _require(
                    full["ignore_eos"],
                    "ignore_eos",
                    full["ignore_eos"],
                    "true with arrivals.answers: own, so that every engine's answers have the same lengths",
                )
            return full | {"arrivals": checked}
    if unknown := sorted(set(params) - set(defaults), key=str):
        raise ValueError(
            f"{unknown[0]}: unknown parameter of kind {kind}; allowed: {', '.join(defaults)}"
        )
    full = defaults | params
    for name, value in full.items():
        if name in _RANGES:
            full[name] = _check_range(name, value, 0 if name in _MAY_BE_ZERO else 1)
        elif name in ("ignore_eos", "as_chat"):
            _require(isinstance(value, bool), name, value, "true or false")
        elif name == "sha256":
            _require(isinstance(value, str), name, value, "text")
        elif name in ("path", "content"):
            _require(
                isinstance(value, str) or (name == "content" and value is None),
                name,
                value,
                "the name of a file of JSON lines",
            )
        elif name == "num_requests" and value is None and kind == "file":
            pass  # all lines
        elif name in ("temperature", "top_p", "speed"):
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
    if "vocab_size" in full:
        _require(full["vocab_size"] >= 2, "vocab_size", full["vocab_size"], "2 or more")
    if kind == "file":
        if full["content"] is None:
            full["content"] = workload_files.read(full["path"], full["num_requests"], MOST_OF)
        else:
            workload_files.unpack(full["content"])
    return full


def build(name: str, kind: str, params: Params) -> Workload:
    """Draws a workload. Raises ValueError for invalid parameters."""
    full = check_params(kind, params)
    schedule: Schedule | None = None
    if kind == "trace":
        waves, schedule = _trace(full)
    else:
        waves = _GENERATORS[kind](full)
        if "arrivals" in full:
            sessions = full["num_conversations"] if kind == "conversation" else 0
            schedule = arrivals.schedule(full["arrivals"], sum(map(len, waves)), sessions)
    workload: Workload = {
        "name": name,
        "kind": kind,
        "params": full,
        "fingerprint": fingerprint(waves, schedule),
        "requests_digest": requests_digest(waves, schedule),
        "waves": waves,
    }
    if schedule is not None:
        workload["arrivals"] = schedule
    return workload


def rebuild(name: str, entry: PlannedWorkload) -> Workload:
    """Draws a workload of a plan again. Raises ValueError if its fingerprint is not the plan's."""
    workload = build(name, entry["kind"], entry["params"])
    if workload["fingerprint"] != entry["fingerprint"]:
        raise ValueError(
            f"workload {name!r}: the tokens drawn here have fingerprint {workload['fingerprint']}, but the plan's is "
            f"{entry['fingerprint']}. The plan was made with another version of experiments/workloads.py: make it again."
        )
    planned = entry.get("requests_digest")  # not in plans of older versions
    if planned is not None and workload["requests_digest"] != planned:
        raise ValueError(
            f"workload {name!r}: the requests drawn here have digest {workload['requests_digest']}, but the plan's is "
            f"{planned}: their sampling parameters or waves differ. Make the plan again."
        )
    return workload


def summarize(workload: Workload) -> PlannedWorkload:
    """A workload as stored in a plan, without tokens."""
    requests = [request for wave in workload["waves"] for request in wave]
    return {
        "kind": workload["kind"],
        "params": workload["params"],
        "fingerprint": workload["fingerprint"],
        "requests_digest": workload["requests_digest"],
        "num_requests": len(requests),
        "prompt_tokens": sum(len(r["prompt_token_ids"]) for r in requests),
        "output_tokens": sum(r["max_tokens"] for r in requests),
    }


def fingerprint(waves: Waves, schedule: Schedule | None = None) -> str:
    """SHA-256 of all prompts and output lengths, waves in order, and of the arrivals where there are
    any, without sampling parameters.
    """
    requests = [request for wave in waves for request in wave]
    content: dict[str, Any] = {
        "output_lengths": [r["max_tokens"] for r in requests],
        "prompt_token_ids": [r["prompt_token_ids"] for r in requests],
    }
    if schedule is not None:
        content["arrivals"] = schedule
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def requests_digest(waves: Waves, schedule: Schedule | None = None) -> str:
    """SHA-256 of all that the requests are: prompts, output lengths, sampling parameters, seeds, and
    which of them arrive together or when. `fingerprint` stays as published, so it tells of prompts,
    output lengths and arrivals only.
    """
    content: Any = waves if schedule is None else {"waves": waves, "arrivals": schedule}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def tokens_digest(outputs: list[list[int]]) -> str:
    """SHA-256 of the JSON of all outputs in the order of the requests."""
    return hashlib.sha256(json.dumps(outputs, separators=(",", ":")).encode()).hexdigest()


def _canonical(p: Params) -> Waves:
    """The workload of nano-vllm's bench.py: draws prompt by prompt (length, then tokens), then all
    output lengths.
    """
    rng = random.Random(p["seed"])
    prompts = [_tokens(rng, rng.randint(*p["prompt_tokens"]), p) for _ in range(p["num_requests"])]
    lengths = [rng.randint(*p["output_tokens"]) for _ in range(p["num_requests"])]
    return [_requests(prompts, lengths, p)]


def _shared_prefix(p: Params) -> Waves:
    """Each request consists of one of the prefixes, chosen at random, and its own tokens."""
    rng = random.Random(p["seed"])
    prefixes = [_tokens(rng, rng.randint(*p["prefix_tokens"]), p) for _ in range(p["num_prefixes"])]
    prompts = [
        rng.choice(prefixes) + _tokens(rng, rng.randint(*p["own_tokens"]), p)
        for _ in range(p["num_requests"])
    ]
    lengths = [rng.randint(*p["output_tokens"]) for _ in range(p["num_requests"])]
    return [_requests(prompts, lengths, p)]


def _conversation(p: Params) -> Waves:
    """One wave per turn. A prompt holds the system prompt and all earlier turns. Earlier answers are
    drawn here, so that every engine serves the same work; with `arrivals: {answers: own}` they give
    way to the engine's own when a turn is submitted (experiments/load/own_answers.py).
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


def _file(p: Params) -> Waves:
    prompts, lengths = workload_files.prompts_of_file(p["content"], p["default_output_tokens"])
    return [_requests(prompts, lengths, p)]


def _check_trace(params: Params) -> Params:
    """The parameters of a trace with the digest of its file. Raises ValueError for a missing path and
    for a file that is not the planned one.
    """
    if "arrivals" in params:
        raise ValueError(
            "arrivals: a trace has its own; remove them, and use `speed` to replay it faster or slower"
        )
    path = params.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError(
            f"path: {path!r} is not allowed; allowed: the path of a trace as JSON lines (experiments/load/traces.py)"
        )
    speed = params.get("speed", 1.0)
    if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not 1e-6 <= speed <= 1e6:
        raise ValueError(f"speed: {speed!r} is not allowed; allowed: a number from 1e-6 to 1e6")
    digest = traces.read(path, 1)[1]
    if params.get("sha256") not in (None, "", digest):
        raise ValueError(
            f"sha256: {path} has {digest}, but {params['sha256']!r} was asked for: restore the file, or correct the digest"
        )
    return {**params, "sha256": digest}


def _trace(p: Params) -> tuple[Waves, Schedule]:
    """The requests of a trace, and when they are due. Blocks of equal hash ids hold equal tokens."""
    lines, _ = traces.read(p["path"], p["num_requests"])
    block_tokens = -(-p["block_tokens"] // p["shrink"])
    prompts, rng = [], random.Random(p["seed"])
    for line in lines:
        size = min(-(-line["prompt_tokens"] // p["shrink"]), p["max_prompt_tokens"])
        prompt: list[int] = []
        for block in line.get("hash_ids", [])[: -(-size // block_tokens)]:
            prompt += _tokens(random.Random(f"{p['seed']}/{block}"), block_tokens, p)
        prompts.append((prompt + _tokens(rng, max(0, size - len(prompt)), p))[:size])
    lengths = [
        min(-(-line["output_tokens"] // p["shrink"]), p["max_output_tokens"]) for line in lines
    ]
    due_s = [line["time_s"] / p["speed"] for line in lines]
    rate = (len(due_s) - 1) / (due_s[-1] - due_s[0]) if due_s[-1] > due_s[0] else None
    schedule: Schedule = {"rate": rate, "offset_s": due_s, "after": [None] * len(lines)}
    return [_requests(prompts, lengths, p)], schedule


_GENERATORS: dict[str, Callable[[Params], Waves]] = {
    "canonical": _canonical,
    "random": _canonical,  # the same draws at another scale
    "shared_prefix": _shared_prefix,
    "conversation": _conversation,
    "file": _file,
}


def _tokens(rng: random.Random, count: int, p: Params) -> list[int]:
    return [rng.randint(0, p["vocab_size"] - 1) for _ in range(count)]


def _requests(
    prompts: list[list[int]], lengths: list[int], p: Params, first_index: int = 0
) -> list[Request]:
    return [
        {
            "prompt_token_ids": prompt,
            "max_tokens": length,
            "temperature": p["temperature"],
            "top_k": p["top_k"],
            "top_p": p["top_p"],
            "ignore_eos": p["ignore_eos"],
            "seed": _request_seed(p["seed"], first_index + i),
        }
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def _request_seed(seed: int, index: int) -> int:
    """A 31-bit seed for each request, independent of the tokens, so that the fingerprint does not
    depend on it.
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
