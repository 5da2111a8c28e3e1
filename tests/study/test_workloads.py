"""Workloads are the same everywhere, and wrong parameters say what is allowed."""

from __future__ import annotations

import itertools
import random

import pytest

from experiments import workloads


def test_the_canonical_workload_has_the_published_fingerprint() -> None:
    random.seed(123)  # whatever an engine did to the global generator
    workload = workloads.build("canonical", "canonical", {})
    summary = workloads.summarize(workload)
    assert workload["fingerprint"] == workloads.CANONICAL_FINGERPRINT
    assert (summary["num_requests"], summary["prompt_tokens"], summary["output_tokens"]) == (
        256,
        142_827,
        133_966,
    )


def test_sampling_parameters_leave_the_fingerprint_alone() -> None:
    sampled, greedy = (
        workloads.build("w", "random", {"num_requests": 4, "temperature": t}) for t in (0.6, 0)
    )
    assert sampled["fingerprint"] == greedy["fingerprint"]
    assert (
        workloads.build("w", "random", {"num_requests": 4, "seed": 1})["fingerprint"]
        != greedy["fingerprint"]
    )


@pytest.mark.parametrize("kind", workloads.DEFAULTS)
def test_every_request_is_complete_and_seeded(kind: str) -> None:
    workload = workloads.build("w", kind, {})
    requests = [request for wave in workload["waves"] for request in wave]
    assert {frozenset(request) for request in requests} == {
        frozenset(
            {
                "prompt_token_ids",
                "max_tokens",
                "temperature",
                "top_k",
                "top_p",
                "seed",
                "ignore_eos",
            }
        )
    }
    assert len({request["seed"] for request in requests}) == len(requests)
    assert all(
        0 <= token < workload["params"]["vocab_size"]
        for r in requests
        for token in r["prompt_token_ids"]
    )


def test_a_scaled_workload_stays_in_its_ranges() -> None:
    (wave,) = workloads.build(
        "w", "random", {"num_requests": 64, "prompt_tokens": [12, 128], "output_tokens": 7}
    )["waves"]
    assert all(
        12 <= len(request["prompt_token_ids"]) <= 128 and request["max_tokens"] == 7
        for request in wave
    )


def test_shared_prefixes_are_shared() -> None:
    params = {"num_prefixes": 3, "prefix_tokens": 50, "num_requests": 40, "own_tokens": [5, 9]}
    (wave,) = workloads.build("w", "shared_prefix", params)["waves"]
    assert len({tuple(request["prompt_token_ids"][:50]) for request in wave}) == 3
    assert len({tuple(request["prompt_token_ids"]) for request in wave}) == 40


def test_a_conversation_holds_its_own_history() -> None:
    params = {
        "num_conversations": 3,
        "turns": 3,
        "system_tokens": 10,
        "user_tokens": [4, 6],
        "answer_tokens": [2, 5],
    }
    waves = workloads.build("w", "conversation", params)["waves"]
    assert [len(wave) for wave in waves] == [3, 3, 3]
    for before, after in itertools.pairwise(waves):
        for old, new in zip(before, after, strict=True):
            prompt = old["prompt_token_ids"]
            assert new["prompt_token_ids"][: len(prompt)] == prompt
            assert len(new["prompt_token_ids"]) >= len(prompt) + old["max_tokens"] + 4


def test_a_plan_of_other_tokens_is_refused() -> None:
    entry = workloads.summarize(workloads.build("w", "random", {"num_requests": 2}))
    assert workloads.rebuild("w", entry)["fingerprint"] == entry["fingerprint"]
    with pytest.raises(ValueError, match=r"workload 'w'.*make it again"):
        workloads.rebuild("w", {**entry, "fingerprint": "0" * 64})


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("rando", {}, "kind: 'rando' is unknown; allowed: canonical, random"),
        (
            "random",
            {"num_request": 3},
            "num_request: unknown parameter of kind random; allowed: num_requests",
        ),
        (
            "random",
            {"num_requests": 0},
            "num_requests: 0 is not allowed; allowed: a whole number from 1 to 1000000",
        ),
        ("random", {"num_requests": True}, "num_requests: True is not allowed"),
        (
            "random",
            {"prompt_tokens": [9, 3]},
            r"prompt_tokens: \[9, 3\] is not allowed; allowed: .*low <= high",
        ),
        ("random", {"output_tokens": 0}, "output_tokens: .*1 <= low"),
        ("random", {"temperature": -1}, "temperature: -1 is not allowed; allowed: 0"),
        ("random", {"top_p": 0}, r"top_p: 0 is not allowed; allowed: in \(0, 1\]"),
        (
            "random",
            {"ignore_eos": "yes"},
            "ignore_eos: 'yes' is not allowed; allowed: true or false",
        ),
    ],
)
def test_wrong_parameters_say_what_is_allowed(
    kind: str, params: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        workloads.build("w", kind, params)
