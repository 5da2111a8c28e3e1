"""What the gate sees of an engine with another random generator, by number of requests: the share of
samples in which it fails.

    PYTHONPATH=src:. python benchmarks/gate_power.py [--requests 128] [--tokens 64]

HF samples `--requests` answers at each of two temperatures, in float32, on `tiny`. They are scored
as they are, with the two temperatures exchanged, and with random tokens at their ends; then requests
are drawn from those scores, and the rules are applied to each draw.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from experiments.gate.rescoring import Request, Rescorer
from experiments.gate.rules import GateParams, judge_distribution
from experiments.gate.scoring import Scores
from nanovllm.models.checkpoint import ensure_checkpoint
from tests.support.hf_names import CACHE

PARAMS = GateParams()
RULES = {
    "z": "do not follow",
    "one request": ": its tokens are too unlikely",
    "dispersion": "and others too unlikely",
    "ends": "the last tokens of many",
}
PROMPT = 40


def requests_of(temperature: float, count: int, tokens: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    rest = {"max_tokens": tokens, "top_k": 0, "top_p": 1.0, "ignore_eos": True, "seed": 0}
    return [  # type: ignore[return-value]
        {
            "prompt_token_ids": [rng.randrange(2048) for _ in range(PROMPT)],
            "temperature": temperature,
            **rest,
        }
        for _ in range(count)
    ]


@torch.inference_mode()
def sampled(model: Any, requests: Sequence[Request], seed: int) -> list[list[int]]:
    """By torch's generator."""
    generator = torch.Generator().manual_seed(seed)
    ids, cache = torch.tensor([r["prompt_token_ids"] for r in requests]), None
    outputs = []
    for _ in range(requests[0]["max_tokens"]):
        result = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        cache = result[CACHE]
        scaled = result.logits[:, -1].float() / requests[0]["temperature"]
        ids = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
        outputs.append(ids[:, 0])
    return torch.stack(outputs, 1).tolist()  # type: ignore[no-any-return]


def shares(
    pools: Sequence[Sequence[Scores]], sizes: Sequence[int], tokens: int, draws: int
) -> dict[str, float]:
    """Of draws in which each rule fails, `sizes[i]` requests being drawn from pools[i]."""
    rng = random.Random(0)
    failed = dict.fromkeys([*RULES, "any"], 0)
    for _ in range(draws):
        scores = [
            rng.choice(pool) for pool, size in zip(pools, sizes, strict=True) for _ in range(size)
        ]
        _, reasons = judge_distribution(scores, PARAMS, [tokens] * len(scores))
        for name, text in RULES.items():
            failed[name] += any(text in reason for reason in reasons)
        failed["any"] += bool(reasons)
    return {name: count / draws for name, count in failed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs=2, default=[0.6, 0.7])
    parser.add_argument("--draws", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = ensure_checkpoint("tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rescorer = Rescorer(folder, "float32")
    rng = random.Random(0)
    right, exchanged, garbled = [], [], {}
    for i, temperature in enumerate(args.temperatures):
        requests = requests_of(temperature, args.requests, args.tokens, i)
        outputs = sampled(model, requests, i)
        right.append(rescorer.score(requests, outputs, unknown_noise=True))
        other = [{**r, "temperature": args.temperatures[1 - i]} for r in requests]
        exchanged.append(rescorer.score(other, outputs, unknown_noise=True))  # type: ignore[arg-type]
        if i == 0:
            for last in (1, 2):
                wrong = [
                    output[:-last] + [rng.randrange(2048) for _ in range(last)]
                    for output in outputs
                ]
                garbled[last] = rescorer.score(requests, wrong, unknown_noise=True)
    print("| what | requests | " + " | ".join([*RULES, "any"]) + " |")
    print("| --- | ---: |" + " ---: |" * (len(RULES) + 1))

    def row(what: str, pools: Sequence[Sequence[Scores]], sizes: Sequence[int]) -> None:
        found = shares(pools, sizes, args.tokens, args.draws)
        cells = " | ".join(f"{share:.2f}" for share in found.values())
        print(f"| {what} | {sum(sizes)} | {cells} |", flush=True)

    for n in (16, 32, 64, 128, 256):
        row("nothing is wrong", right, [n // 2, n // 2])
    names = " and ".join(f"{t:g}" for t in args.temperatures)
    for n in (16, 32, 64, 128, 256):
        row(f"temperatures {names} exchanged", exchanged, [n // 2, n // 2])
    for last in (1, 2):
        for share in (1.0, 0.25, 0.05):
            for n in (8, 32, 128):
                bad = max(1, round(share * n))
                what = f"last {last} random in {share:.0%} of answers"
                row(what, [garbled[last], right[0]], [bad, n - bad])


if __name__ == "__main__":
    main()
