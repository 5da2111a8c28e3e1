"""The driver in virtual time: when requests are sent, which waits are the engine's and which the
generator's, what makes a launch invalid, and the search for a rate.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.load import arrivals, delivered, objective
from experiments.load.driving import Timeline, drive
from experiments.load.searching import Judge, allowed_misses, search
from experiments.records.types import LoadRules, Schedule

RULES: LoadRules = {
    "slo": None,
    "slo_name": None,
    "attainment": 0.99,
    "max_lateness_s": 0.01,
    "min_delivered": 0.98,
}


class Station:
    """One server in virtual time: a step serves a token of the oldest request and takes `step_s`."""

    def __init__(self, tokens: list[int], step_s: float = 0.1, submit_s: float = 0.0) -> None:
        self.now, self.step_s, self.submit_s = 100.0, step_s, submit_s
        self.left, self.done = list(tokens), [0] * len(tokens)
        self.queue: list[int] = []
        self.submitted: list[tuple[float, int]] = []
        self.aborted: list[int] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-9)  # time goes on, whatever a float can hold

    def submit(self, index: int) -> None:
        self.submitted.append((self.now - 100, index))
        self.now += self.submit_s
        self.queue.append(index)

    def advance(self) -> list[tuple[int, int, bool]]:
        assert self.queue, "a step without a request"
        self.now += self.step_s
        index = self.queue[0]
        self.done[index] += 1
        finished = self.done[index] == self.left[index]
        if finished:
            self.queue.pop(0)
        return [(index, self.done[index], finished)]

    def abort(self, index: int) -> None:
        self.aborted.append(index)

    def drive(self, schedule: Schedule, **more: Any) -> Timeline:
        return drive(self, schedule, clock=self.clock, sleep=self.sleep, **more)


def at(*moments: float) -> Schedule:
    return {"rate": 1.0, "offset_s": list(moments), "after": [None] * len(moments)}


def test_a_request_that_is_due_during_a_step_waits_for_it_and_its_clock_runs() -> None:
    station = Station([2, 1], step_s=0.1)
    line = station.drive(at(1.0, 1.05))
    assert line.due_s == [1.0, 1.05]
    assert line.sent_s == pytest.approx([1.0, 1.1])
    assert line.lateness_s == pytest.approx([0.0, 0.0])  # the wait was the engine's
    assert line.token_s[0] == pytest.approx([1.1, 1.2])
    assert line.token_s[1] == pytest.approx([1.3])
    assert objective.latencies(1.05, line.token_s[1])["ttft_s"] == pytest.approx(0.25)
    assert line.duration_s == pytest.approx(1.3)


def test_a_slow_generator_is_late_by_its_own_fault() -> None:
    station = Station([1] * 10, step_s=0.01, submit_s=0.05)
    schedule = at(*[1 + 0.001 * n for n in range(10)])
    load = delivered.record(station.drive(schedule), schedule)
    assert load["lateness_max_s"] > 0.3
    assert load["delivered"] is not None
    assert load["delivered"] < 0.1
    found = delivered.objections(load, RULES)
    assert len(found) == 2
    assert "late by" in found[0]
    assert "allowed: 0.01 s" in found[0]
    assert "of the rate asked for; allowed: 98.0% or more" in found[1]


def test_a_busy_engine_is_not_held_against_the_generator() -> None:
    """Twenty times overloaded: all latency is the engine's, and the launch is valid."""
    station = Station([1] * 50, step_s=1.0)
    schedule = at(*[0.05 * n for n in range(50)])
    line = station.drive(schedule)
    load = delivered.record(line, schedule)
    assert delivered.objections(load, RULES) == []
    assert load["delivered"] == 1.0
    assert line.token_s[-1][0] == pytest.approx(50.0)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    gaps=st.lists(st.floats(0, 1), min_size=12, max_size=12),
    step_s=st.floats(0.001, 1),
)
def test_one_server_serves_in_order_as_lindley_says(
    tokens: list[int], gaps: list[float], step_s: float
) -> None:
    due = [sum(gaps[: n + 1]) for n in range(len(tokens))]
    station = Station(tokens, step_s)
    line = station.drive(at(*due))
    free = 0.0
    for moment, count, times in zip(due, tokens, line.token_s, strict=True):
        # a step may have begun just before: service starts when the server is free
        free = max(free, moment) + count * step_s
        assert len(times) == count
        assert times[-1] == pytest.approx(free, abs=1e-6)
    assert all(line.finished)
    assert sorted(index for _, index in station.submitted) == list(range(len(tokens)))
    for sent, index in station.submitted:
        assert sent >= due[index] - 1e-9


def test_followers_come_after_the_answer_and_the_time_to_think() -> None:
    station = Station([1, 1, 1], step_s=0.5)
    line = station.drive({"rate": None, "offset_s": [0.0, 2.0, 0.0], "after": [None, 0, 1]})
    assert line.due_s == pytest.approx([0.0, 2.5, 3.0])
    assert line.token_s == [pytest.approx([0.5]), pytest.approx([3.0]), pytest.approx([3.5])]


def test_a_trial_that_cannot_pass_is_given_up() -> None:
    station = Station([1] * 100, step_s=1.0)
    judge = Judge({"ttft_s": 2.5}, allowed=1)
    line = station.drive(at(*[0.1 * n for n in range(100)]), watch=judge.restarted())
    assert line.stopped
    assert not judge.passes
    assert judge.misses == 2
    assert judge.finished < 10
    sent = {index for _, index in station.submitted}
    assert set(station.aborted) == {index for index in sent if not line.finished[index]}
    load = delivered.record(line, at(*[0.1 * n for n in range(100)]))
    assert load["never_sent"] == 100 - len(sent) > 0
    assert "never sent" in delivered.objections(load, RULES)[0]


def test_gaps_survive_packing() -> None:
    assert delivered.unpack(delivered.pack([[1.0, 1.5, 1.500002], [2.0], []])) == [
        [500000, 2],
        [],
        [],
    ]


@settings(max_examples=60, deadline=None)
@given(limit=st.floats(1.2, 90), within=st.floats(1.01, 1.5))
def test_the_search_brackets_the_limit(limit: float, within: float) -> None:
    tried: list[float] = []

    def trial(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = search(trial, {"low": 1, "high": 100, "within": within, "most": 30})
    assert found.stopped == "within"
    assert found.rate is not None
    assert found.failed is not None
    assert found.rate <= limit < found.failed <= found.rate * within
    assert len(tried) <= 2 + math.ceil(math.log2(math.log(100) / math.log(within)))


@pytest.mark.parametrize(
    ("limit", "most", "stopped", "rate"),
    [(0.5, 9, "low failed", None), (200, 9, "high passed", 100), (50, 3, "most", 10)],
)
def test_why_a_search_stops(limit: float, most: int, stopped: str, rate: float | None) -> None:
    found = search(lambda r: r <= limit, {"low": 1, "high": 100, "within": 1.05, "most": most})
    assert (found.stopped, found.rate) == (stopped, rate)


@pytest.mark.parametrize(
    ("requests", "attainment", "allowed"),
    [(100, 0.99, 1), (99, 0.99, 0), (200, 0.995, 1), (7, 1.0, 0)],
)
def test_how_many_requests_may_miss(requests: int, attainment: float, allowed: int) -> None:
    assert allowed_misses(requests, attainment) == allowed


def test_objectives_by_name_and_by_limit() -> None:
    assert objective.check("mlperf-llama2-70b-interactive") == {"ttft_s": 0.45, "tpot_s": 0.04}
    given_limits = {"ttft_s": 0.2, "itl_s": 0.05}
    limits = objective.check(given_limits)
    assert limits == given_limits
    assert objective.meets(limits, 1.0, [1.15, 1.19, 1.23])
    assert not objective.meets(limits, 1.0, [1.15, 1.26])
    assert not objective.meets(limits, 0.9, [1.15])
    assert not objective.meets(limits, 0.9, [])
    for wrong in ("mlperf", {}, {"ttft": 1}, {"ttft_s": 0}, {"ttft_s": True}, 3):
        with pytest.raises(ValueError, match="allowed"):
            objective.check(wrong)


def test_every_process_can_be_driven_to_its_end() -> None:
    for params in (
        {"process": "poisson", "rate": 3},
        {"process": "gamma", "rate": 3, "burstiness": 0.3},
        {"process": "constant", "rate": 3},
        {"process": "closed", "users": 4, "think_s": 0.1},
    ):
        schedule = arrivals.schedule(arrivals.check(params, sessions=False), 30)
        line = Station([2] * 30).drive(schedule)
        assert all(line.finished)
        assert None not in line.sent_s
