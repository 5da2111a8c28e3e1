"""Workloads are the same everywhere, and wrong parameters say what is allowed."""

from __future__ import annotations

import copy
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import workloads
from experiments.engines import nanovllm, vllm
from experiments.study.spec import Workload
from nanovllm.sampling_params import SamplingParams


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


RANGES = st.integers(1, 12) | st.lists(st.integers(1, 12), min_size=2, max_size=2).map(sorted)
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.25, 0.7, 1.0, 1.5]),
    "top_k": st.integers(0, 50),
    "top_p": st.sampled_from([0.1, 0.5, 0.93, 1.0]),
    "ignore_eos": st.booleans(),
}


def drawn_params(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Sizes of a kind, so that it stays small, and any of its other parameters."""
    own: dict[str, st.SearchStrategy[Any]] = {}
    for name, default in workloads.DEFAULTS[kind].items():
        if name in SAMPLING:
            own[name] = SAMPLING[name]
        elif name == "vocab_size":
            own[name] = st.integers(2, 300)
        elif name == "seed":
            own[name] = st.integers(0, 2**63 - 1)
        else:
            a_range = isinstance(default, list) or name.endswith("_tokens")
            own[name] = RANGES if a_range else st.integers(1, 5)
    free = {*SAMPLING, "vocab_size", "seed"}
    return st.fixed_dictionaries(
        {name: values for name, values in own.items() if name not in free},
        optional={name: values for name, values in own.items() if name in free},
    )


DRAWN = [kind for kind in workloads.DEFAULTS if kind != "file"]
STUDIES = st.sampled_from(sorted(DRAWN)).flatmap(
    lambda kind: st.tuples(st.just(kind), drawn_params(kind))
)


@settings(max_examples=60, deadline=None)
@given(study=STUDIES)
def test_every_parameter_of_a_study_arrives_at_every_request(
    study: tuple[str, dict[str, Any]],
) -> None:
    """From the YAML of a study to what our engine and vLLM are called with."""
    kind, given_params = study
    workload = Workload.model_validate({"kind": kind, **given_params})
    built = workloads.build("w", workload.kind, workload.params)
    p = workloads.DEFAULTS[kind] | given_params
    waves = built["waves"]
    requests = [request for wave in waves for request in wave]

    def bounds(name: str) -> tuple[int, int]:
        low, high = p[name] if isinstance(p[name], (list, tuple)) else (p[name], p[name])
        return low, high

    if kind == "conversation":
        assert [len(wave) for wave in waves] == [p["num_conversations"]] * p["turns"]
        output, system, user = map(bounds, ("answer_tokens", "system_tokens", "user_tokens"))
        # each turn adds a question, and the answer before it
        prompt = [
            (
                system[0] + (turn + 1) * user[0] + turn * output[0],
                system[1] + (turn + 1) * user[1] + turn * output[1],
            )
            for turn in range(p["turns"])
            for _ in range(p["num_conversations"])
        ]
    else:
        assert [len(wave) for wave in waves] == [p["num_requests"]]
        output = bounds("output_tokens")
        if kind == "shared_prefix":
            parts = [bounds("prefix_tokens"), bounds("own_tokens")]
            longest = parts[0][1]
            starts = {tuple(r["prompt_token_ids"][:longest]) for r in requests}
            if parts[0][0] == longest:
                assert len(starts) <= p["num_prefixes"]
            prompt = [(sum(low for low, _ in parts), sum(high for _, high in parts))]
        else:
            prompt = [bounds("prompt_tokens")]
        prompt *= len(requests)
    for request, (least, most) in zip(requests, prompt, strict=True):
        assert least <= len(request["prompt_token_ids"]) <= most
        assert output[0] <= request["max_tokens"] <= output[1]
        assert all(0 <= token < p["vocab_size"] for token in request["prompt_token_ids"])
        for name in SAMPLING:
            assert request[name] == p[name]  # type: ignore[literal-required]
    other = workloads.build("w", kind, workload.params | {"seed": p["seed"] ^ 1})
    assert other["requests_digest"] != built["requests_digest"]

    ours: Any = object.__new__(nanovllm.Adapter)
    ours._sampling_params = SamplingParams
    theirs: Any = object.__new__(vllm.Adapter)
    theirs._sampling_params, theirs._eos_ids = lambda **given: SimpleNamespace(**given), [1]
    theirs._config = {"per_request_seeds": True}
    prompts, arrived = ours._inputs(requests)
    for request, text, params in zip(requests, prompts, arrived, strict=True):
        assert text["prompt_token_ids"] == request["prompt_token_ids"]
        for each in (params, theirs._params(request)):
            for name in ("max_tokens", "seed", *SAMPLING):
                assert getattr(each, name) == request[name]  # type: ignore[literal-required]


@settings(max_examples=25, deadline=None)
@given(study=STUDIES, data=st.data())
def test_the_digest_of_requests_holds_all_that_a_request_is(
    study: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    """One field of one request changed, or a request in another wave: another digest, and a plan
    with the old one is refused.
    """
    built = workloads.build("w", *study)
    entry = workloads.summarize(built)
    assert workloads.rebuild("w", entry) == built
    waves = copy.deepcopy(built["waves"])
    wave = data.draw(st.sampled_from(waves))
    request: Any = data.draw(st.sampled_from(wave))
    name = data.draw(st.sampled_from([*sorted(request), "its wave"]))
    if name == "its wave":
        waves.append([wave.pop()])
    elif name == "prompt_token_ids":
        request[name][-1] += 1
    else:
        request[name] = not request[name] if name == "ignore_eos" else request[name] + 1
    changed = workloads.requests_digest(waves)
    assert changed != built["requests_digest"]
    with pytest.raises(ValueError, match="sampling parameters or waves differ"):
        workloads.rebuild("w", {**entry, "requests_digest": changed})


@pytest.mark.parametrize("kind", DRAWN)
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
