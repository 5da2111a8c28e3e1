"""Arrival processes: their rates and their spread, the same times for the same seed, and errors that
say what is allowed.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import workloads
from experiments.load import arrivals, traces

OPEN = st.sampled_from(["poisson", "gamma", "constant"])
RATES = st.floats(0.01, 1000)


def of(process: str, rate: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"process": process, "rate": rate, **more}
    if process != "constant":
        given["seed"] = seed
    if process == "gamma":
        given.setdefault("burstiness", 0.5)
    return arrivals.check(given, sessions=False)


@settings(max_examples=40, deadline=None)
@given(process=OPEN, rate=RATES, other=RATES, seed=st.integers(0, 2**63 - 1))
def test_another_rate_only_scales_the_times(
    process: str, rate: float, other: float, seed: int
) -> None:
    first, second = (arrivals.schedule(of(process, r, seed), 50) for r in (rate, other))
    assert first == arrivals.schedule(of(process, rate, seed), 50)
    times = first["offset_s"]
    assert times == sorted(times)
    assert times[0] >= 0
    for a, b in zip(times, second["offset_s"], strict=True):
        assert a * rate == pytest.approx(b * other, rel=1e-9)
    scaled = arrivals.scaled(first, other)
    assert scaled["rate"] == other
    assert scaled["offset_s"] == pytest.approx(second["offset_s"], rel=1e-9)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    params = of("gamma", 8.0, seed=3, burstiness=burstiness)
    times = arrivals.schedule(params, 20_000)["offset_s"]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert deviation / mean == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_gaps_are_exponential() -> None:
    times = arrivals.schedule(of("poisson", 4.0, seed=1), 20_000)["offset_s"]
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    for share in (0.1, 0.5, 0.9, 0.99):
        expected = -math.log(1 - share) / 4
        assert gaps[int(share * len(gaps))] == pytest.approx(expected, rel=0.08)


def test_a_seed_gives_its_own_times_and_constant_gaps_are_equal() -> None:
    one, two = (arrivals.schedule(of("poisson", 4.0, seed=s), 20) for s in (1, 2))
    assert one != two
    times = arrivals.schedule(of("constant", 4.0), 5)["offset_s"]
    assert times == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25])


def test_a_closed_loop_sends_a_users_next_request_after_its_last() -> None:
    params = arrivals.check({"process": "closed", "users": 3, "think_s": 0.5}, sessions=False)
    got = arrivals.schedule(params, 7)
    assert got["rate"] is None
    assert got["after"] == [None, None, None, 0, 1, 2, 3]
    assert got["offset_s"] == [0.0] * 3 + [0.5] * 4
    with pytest.raises(ValueError, match="closed loop has no rate"):
        arrivals.scaled(got, 2.0)
    drawn = arrivals.check(
        {"process": "closed", "users": 3, "think_s": 0.5, "think": "exponential"}, sessions=False
    )
    assert len(set(arrivals.schedule(drawn, 9)["offset_s"])) == 7


def test_turns_of_a_conversation_follow_their_answers() -> None:
    params = {
        "num_conversations": 3,
        "turns": 2,
        "arrivals": {"process": "poisson", "rate": 2, "think_s": 0.25},
    }
    built = workloads.build("w", "conversation", params)
    got = built["arrivals"]
    assert got["after"] == [None, None, None, 0, 1, 2]
    assert got["offset_s"][3:] == [0.25] * 3
    faster = arrivals.scaled(got, 4.0)
    assert faster["offset_s"][3:] == [0.25] * 3  # people think as long as before


WRONG: list[tuple[Any, str]] = [
    ("poisson", "arrivals: 'poisson' is not allowed; allowed: a mapping"),
    ({"process": "posson", "rate": 1}, "'posson' is not allowed; allowed: .*poisson"),
    ({"process": "poisson"}, r"arrivals.rate: missing; .* \(or `search`\): requests per second"),
    ({"process": "poisson", "rate": 0}, "arrivals.rate: 0 is not allowed"),
    ({"process": "poisson", "rate": True}, "arrivals.rate: True is not allowed"),
    ({"process": "poisson", "rate": float("nan")}, "arrivals.rate: nan is not allowed"),
    ({"process": "poisson", "rate": 1, "users": 2}, "arrivals.users: unknown parameter"),
    ({"process": "gamma", "rate": 1}, "arrivals.burstiness: missing"),
    ({"process": "poisson", "rate": 1, "think_s": 1}, "think_s: 1 has no effect"),
    ({"process": "closed"}, "arrivals.users: missing"),
    ({"process": "closed", "users": 2, "think": "long"}, "arrivals.think: 'long' is not allowed"),
    ({"process": "poisson", "rate": 1, "search": {"low": 1, "high": 2}}, "remove one of them"),
    ({"process": "poisson", "search": {"low": 2, "high": 2}}, "arrivals.search.high: 2"),
    ({"process": "poisson", "search": {"low": 1, "high": 2, "most": 1}}, "search.most: 1"),
    ({"process": "poisson", "search": {"least": 1}}, "a mapping of low, high, within, most"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_arrivals_say_what_is_allowed(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workloads.check_params("random", {"arrivals": wrong})


def test_fingerprint_and_digest_hold_the_arrivals() -> None:
    def built(**params: Any) -> Any:
        return workloads.build("w", "random", {"num_requests": 4, **params})

    plain = built()
    slow, fast, again = (built(arrivals={"process": "poisson", "rate": rate}) for rate in (1, 2, 1))
    assert slow == again
    for key in ("fingerprint", "requests_digest"):
        assert len({plain[key], slow[key], fast[key]}) == 3
    assert plain["waves"] == slow["waves"] == fast["waves"]  # the same requests at every rate
    entry = workloads.summarize(slow)
    assert workloads.rebuild("w", entry) == slow
    entry["params"] = {**entry["params"], "arrivals": fast["params"]["arrivals"]}
    with pytest.raises(ValueError, match="make it again"):
        workloads.rebuild("w", entry)


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,110,27
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 12, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 1000, "input_length": 9, "output_length": 2, "hash_ids": [0, 2]}
"""


@pytest.mark.parametrize(
    ("name", "text", "times", "prompts"),
    [
        ("azure", AZURE, [0.0, 0.052], [4808, 110]),
        ("burstgpt", BURSTGPT, [0.0, 113.0], [472, 417]),
        ("mooncake", MOONCAKE, [0.0, 2.0], [9, 12]),
    ],
)
def test_published_traces_are_converted(
    name: str, text: str, times: list[float], prompts: list[int]
) -> None:
    lines = traces.convert(name, text.splitlines())
    assert [line["time_s"] for line in lines] == pytest.approx(times)
    assert [line["prompt_tokens"] for line in lines] == prompts
    with pytest.raises(traces.TraceError, match=f"not a trace of format {name}"):
        traces.convert(name, ["a,b", "1,2"])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = traces.convert("mooncake", MOONCAKE.splitlines())
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_is_replayed_with_its_times_lengths_and_shared_blocks(trace: Path) -> None:
    params = {"path": str(trace), "block_tokens": 8, "speed": 2.0}
    built = workloads.build("w", "trace", params)
    first, second = built["waves"][0]
    assert built["arrivals"]["offset_s"] == [0.0, 1.0]
    assert (len(first["prompt_token_ids"]), first["max_tokens"]) == (9, 2)
    assert (len(second["prompt_token_ids"]), second["max_tokens"]) == (12, 5)
    assert first["prompt_token_ids"][:8] == second["prompt_token_ids"][:8]  # hash id 0
    assert first["prompt_token_ids"][8] != second["prompt_token_ids"][8]
    entry = workloads.summarize(built)
    assert workloads.rebuild("w", entry) == built
    trace.write_text(trace.read_text() + "\n")
    with pytest.raises(ValueError, match="restore the file"):
        workloads.rebuild("w", entry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no requests"),
        ("{", "line 1: not JSON"),
        ('{"time_s": 0}', "line 1: .* is not allowed; allowed: an object with output_tokens"),
        ('{"time_s": -1, "prompt_tokens": 1, "output_tokens": 1}', "time_s is -1"),
        ('{"time_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens is 0"),
        (
            '{"time_s": 1, "prompt_tokens": 1, "output_tokens": 1}\n'
            '{"time_s": 0, "prompt_tokens": 1, "output_tokens": 1}',
            "line 2: time_s is 0, earlier",
        ),
    ],
)
def test_a_broken_trace_is_an_error_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(traces.TraceError, match=message):
        traces.read(path)


def test_a_shrunk_trace_keeps_its_times_and_shared_blocks(trace: Path) -> None:
    params = {"path": str(trace), "block_tokens": 8}
    whole = workloads.build("w", "trace", params)
    small = workloads.build("w", "trace", params | {"shrink": 4})
    assert small["arrivals"] == whole["arrivals"]
    for before, after in zip(whole["waves"][0], small["waves"][0], strict=True):
        assert len(after["prompt_token_ids"]) == -(-len(before["prompt_token_ids"]) // 4)
        assert after["max_tokens"] == -(-before["max_tokens"] // 4)
    for a, b in itertools.combinations(range(len(whole["waves"][0])), 2):
        shared = shared_prefix(whole, a, b) // 8
        assert shared_prefix(small, a, b) // 2 >= shared


def shared_prefix(built: Any, a: int, b: int) -> int:
    """Equal tokens at the beginning of two prompts."""
    pair = zip(*(built["waves"][0][i]["prompt_token_ids"] for i in (a, b)), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda tokens: tokens[0] == tokens[1], pair))


def test_a_missing_trace_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match=r"python -m experiments\.load\.traces"):
        workloads.check_params("trace", {"path": "no/such/file.jsonl"})
    with pytest.raises(ValueError, match="a trace has its own"):
        workloads.check_params("trace", {"arrivals": {"process": "poisson", "rate": 1}})


def test_the_global_generator_is_left_alone() -> None:
    random.seed(5)
    before = random.getstate()
    arrivals.schedule(of("gamma", 2.0), 10)
    assert random.getstate() == before
