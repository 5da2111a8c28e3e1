"""The workloads of a check, drawn by Hypothesis and written to a file before any engine is started.

They are small and full of edge cases: lengths at and around block boundaries, shared and nested
prefixes, identical prompts, mixed sampling parameters in one batch, outputs of one token, with and
without EOS.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, TypedDict

from experiments.records.types import Request

BLOCK_SIZE = 16
LONGEST_PROMPT, LONGEST_ANSWER = 80, 24


class Sampling(TypedDict):
    temperature: float
    top_k: int
    top_p: float


GREEDY: Sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
SAMPLINGS: tuple[Sampling, ...] = (
    GREEDY,
    {"temperature": 0.6, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 20, "top_p": 1.0},
    {"temperature": 0.8, "top_k": 0, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 100, "top_p": 0.8},
)
Workloads = dict[str, list[Request]]


def draw(number: int, vocab_size: int, seed: int = 0) -> Workloads:
    """`number` distinct workloads by name ("drawn-000", ...). Deterministic for a given version of
    Hypothesis.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    lengths = st.one_of(
        st.sampled_from(
            [n + d for n in range(0, LONGEST_PROMPT, BLOCK_SIZE) for d in (-1, 0, 1) if n + d > 0]
        ),
        st.integers(1, LONGEST_PROMPT),
    )
    answers = st.one_of(st.integers(1, 4), st.integers(5, LONGEST_ANSWER))
    one = st.tuples(
        lengths,
        answers,
        st.sampled_from(SAMPLINGS),
        st.sampled_from(("fresh", "shared", "same")),
        st.booleans(),
        st.integers(0, 2**31 - 1),
    )
    found: dict[str, list[Request]] = {}

    @hypothesis.seed(seed)
    @settings(
        max_examples=2 * number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=False,  # if CI is set, Hypothesis would ignore the seed
    )
    @given(st.lists(one, min_size=1, max_size=6), st.integers(0, 2**31 - 1))
    def collect(members: list[Any], token_seed: int) -> None:
        requests = make(members, random.Random(token_seed), vocab_size)
        found.setdefault(json.dumps(requests), requests)

    collect()
    return {f"drawn-{i:03d}": requests for i, requests in enumerate(list(found.values())[:number])}


def make(members: list[Any], rng: random.Random, vocab_size: int) -> list[Request]:
    """Requests from (prompt length, output length, sampling, kind of prompt, ignore_eos, seed). A
    prompt is new, shares a prefix of up to half its length with the one before it, or equals it.
    """
    requests: list[Request] = []
    for length, answer, sampling, kind, ignore_eos, seed in members:
        prompt = [rng.randrange(vocab_size) for _ in range(length)]
        before = requests[-1]["prompt_token_ids"] if requests else prompt
        if kind == "same":
            prompt = list(before)
        elif kind == "shared":
            shared = before[: max(1, length // 2)]
            prompt = shared + prompt[len(shared) :]
        requests.append(
            {
                "prompt_token_ids": prompt,
                "max_tokens": answer,
                "temperature": sampling["temperature"],
                "top_k": sampling["top_k"],
                "top_p": sampling["top_p"],
                "seed": seed,
                "ignore_eos": ignore_eos,
            }
        )
    return requests


def uniform(
    number: int, vocab_size: int, prompt: int, answer: int, sampling: Sampling, seed: int
) -> list[Request]:
    """Requests of the same length and sampling parameters, which HF's `generate` serves without
    padding.
    """
    rng = random.Random(seed)
    return [
        {
            "prompt_token_ids": [rng.randrange(vocab_size) for _ in range(prompt)],
            "max_tokens": answer,
            "temperature": sampling["temperature"],
            "top_k": sampling["top_k"],
            "top_p": sampling["top_p"],
            "ignore_eos": True,
            "seed": rng.getrandbits(31),
        }
        for _ in range(number)
    ]


def write(workloads: Workloads, path: Path) -> None:
    path.write_text(json.dumps(workloads) + "\n")


def read(path: Path) -> Workloads:
    return json.loads(path.read_text())  # type: ignore[no-any-return]
