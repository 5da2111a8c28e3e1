"""Conversations whose next turn holds the engine's own answer: the prompts that are built, what the
engine is given, and that the gate judges each engine on its own answers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import workloads
from experiments.gate.judge import Gate, judge_outputs
from experiments.launch import over_time
from experiments.launch.engine_process import serve_launch
from experiments.load import arrivals, own_answers
from experiments.load.driving import drive
from experiments.records import store
from tests.launch.test_over_time import RULES, ours
from tests.load.test_driving import Station
from tests.support.fake_engine import make_plan

TALK = {
    "num_conversations": 3,
    "turns": 3,
    "system_tokens": 4,
    "user_tokens": [2, 5],
    "answer_tokens": [2, 6],
    "temperature": 0,
}
OWN = {"process": "poisson", "rate": 50, "answers": "own"}


def talk(**params: Any) -> Any:
    return workloads.build("talk", "conversation", {**TALK, "arrivals": OWN, **params})


def requests_of(work: Any) -> list[Any]:
    return [request for wave in work["waves"] for request in wave]


def drawn_answers(work: Any) -> list[list[int]]:
    """What stands in the drawn prompts where the engine's answers will be; of the last turns, any."""
    requests, after = requests_of(work), work["arrivals"]["after"]
    answers = [[0] * request["max_tokens"] for request in requests]
    for index, earlier in enumerate(after):
        if earlier is not None:
            begin = len(requests[earlier]["prompt_token_ids"])
            end = begin + requests[earlier]["max_tokens"]
            answers[earlier] = requests[index]["prompt_token_ids"][begin:end]
    return answers


def test_with_the_drawn_answers_the_prompts_are_the_drawn_ones() -> None:
    work = talk()
    requests = requests_of(work)
    built = own_answers.as_served(requests, work["arrivals"]["after"], drawn_answers(work))
    assert built == requests


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), turns=st.integers(1, 4), data=st.data())
def test_a_prompt_is_the_last_prompt_its_answer_and_new_words(
    seed: int, turns: int, data: st.DataObject
) -> None:
    work = talk(seed=seed, turns=turns)
    requests, after = requests_of(work), work["arrivals"]["after"]
    outputs = [
        data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
        for n in (request["max_tokens"] for request in requests)
    ]
    built = own_answers.as_served(requests, after, outputs)
    drawn = drawn_answers(work)
    for index, earlier in enumerate(after):
        got, asked = built[index], requests[index]
        assert {**got, "prompt_token_ids": None} == {**asked, "prompt_token_ids": None}
        assert len(got["prompt_token_ids"]) == len(asked["prompt_token_ids"])
        if earlier is None:
            assert got == asked
            continue
        before = built[earlier]["prompt_token_ids"]
        begin, end = len(before), len(before) + len(outputs[earlier])
        assert got["prompt_token_ids"][:begin] == before
        assert got["prompt_token_ids"][begin:end] == outputs[earlier]
        assert got["prompt_token_ids"][end:] == asked["prompt_token_ids"][end:]
        assert len(drawn[earlier]) == len(outputs[earlier])


class Talker(Station):
    """A station that notes the prompts it is given; each answer is the prompt's length, repeated."""

    def __init__(self, requests: list[Any]) -> None:
        super().__init__([request["max_tokens"] for request in requests])
        self.prompts = [request["prompt_token_ids"] for request in requests]

    def output(self, index: int) -> list[int]:
        assert self.done[index] == self.left[index], "asked for an answer that is not there yet"
        return [len(self.prompts[index])] * self.left[index]

    def set_prompt(self, index: int, prompt_token_ids: list[int]) -> None:
        assert index not in {submitted for _, submitted in self.submitted}
        self.prompts[index] = prompt_token_ids


def test_the_driver_gives_each_turn_the_answers_before_it() -> None:
    work = talk(turns=4)
    requests, schedule = requests_of(work), work["arrivals"]
    station = Talker(requests)
    face = own_answers.OwnAnswers(station, requests, schedule)
    line = drive(face, schedule, clock=station.clock, sleep=station.sleep)
    assert all(line.finished)
    outputs = [station.output(index) for index in range(len(requests))]
    expected = own_answers.as_served(requests, schedule["after"], outputs)
    assert station.prompts == [request["prompt_token_ids"] for request in expected]


def test_an_engine_continues_its_own_answers_and_the_gate_judges_it_on_them(
    tiny: Path, tmp_path: Path
) -> None:
    work = talk(answer_tokens=8, num_conversations=2)
    requests, schedule = requests_of(work), work["arrivals"]
    adapter = ours(tiny, batching="chunked", prefix_cache=True)
    answer = over_time.answer(adapter, requests, schedule, None)
    outputs = answer["outputs"]
    served = own_answers.as_served(requests, schedule["after"], outputs)
    # the oracle: the same turns one after the other, with the prompts written out
    assert [adapter.serve([request])["outputs"][0] for request in served] == outputs
    again = over_time.answer(adapter, requests, schedule, None)
    assert again["outputs"] == outputs
    adapter.close()

    plan: Any = make_plan(tmp_path / "model")
    plan["workloads"] = {"talk": workloads.summarize(work)}
    plan["model"] = {"preset": None, "path": str(tiny), "dtype": "float32", "digest": None}
    (tmp_path / "out").mkdir()
    with store.Folder(tmp_path / "out") as folder:
        gate = Gate(plan, folder)
        assert gate.requests_of("talk") == requests
        judged = gate.requests_as_served("talk", outputs)
        assert judged == served
        result = judge_outputs(gate.rescorer(), judged, outputs, gate.params)
        assert (result.status, result.mismatches) == ("pass", 0)
        # an engine that was given the drawn answers instead continues something else
        wrong = judge_outputs(gate.rescorer(), requests, outputs, gate.params)
        assert wrong.status == "fail"


def test_a_launch_with_own_answers_is_recorded(tmp_path: Path) -> None:
    plan: Any = make_plan(tmp_path / "model", blocks=1, seconds=0.001)
    work = talk()
    plan["workloads"] = {"talk": workloads.summarize(work)}
    plan["study"]["load"] = RULES
    for launch in plan["launches"]:
        launch["workload_order"] = ["talk"]
    result = serve_launch(plan, plan["launches"][0]["launch"], str(tmp_path))
    served = result["record"]["workloads"]["talk"]
    assert (result["record"]["status"], served["num_requests"]) == ("ok", 9)
    assert served["requests_digest"] == work["requests_digest"]


def test_own_answers_are_asked_for_by_name() -> None:
    drawn = talk(arrivals={"process": "poisson", "rate": 50})
    said = talk(arrivals={"process": "poisson", "rate": 50, "answers": "drawn"})
    assert said == drawn  # the default leaves no trace, and no hash changes
    assert not own_answers.wanted(drawn["arrivals"])
    own = talk()
    assert own_answers.wanted(own["arrivals"])
    assert own_answers.wanted(arrivals.scaled(own["arrivals"], 3.0))
    assert own["requests_digest"] != drawn["requests_digest"]
    assert own["fingerprint"] != drawn["fingerprint"]
    assert own["waves"] == drawn["waves"]


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("conversation", {**TALK, "arrivals": {**OWN, "answers": "his"}}, "allowed: drawn, own"),
        ("conversation", {**TALK, "arrivals": OWN, "ignore_eos": False}, "ignore_eos: False is"),
        ("random", {"arrivals": OWN}, "arrivals.answers: unknown parameter"),
    ],
)
def test_wrong_answers_say_what_is_allowed(kind: str, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workloads.build("w", kind, copy.deepcopy(params))
