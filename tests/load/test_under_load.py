"""The statistics of requests that arrive over time, held against queues with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.load.delivered import pack
from experiments.records.types import LoadRules
from reports.figures.load_curves import pareto_front
from reports.statistics import energy, steady_state, under_load
from reports.statistics.intervals import t_interval
from reports.statistics.under_load import Requests, Transient
from tests.support import queues

RULES: LoadRules = {
    "slo": {"ttft_s": 3.0},
    "slo_name": None,
    "attainment": 0.99,
    "max_lateness_s": 0.01,
    "min_delivered": 0.98,
}


def requests_of(arrivals: Any, starts: Any, ends: Any) -> Requests:
    return Requests(arrivals, starts, ends, [np.array([0.1, 0.3])] * len(arrivals))


def test_the_simulated_queues_have_their_known_answers() -> None:
    rng = np.random.default_rng(1)
    arrivals, _, ends = queues.simulate_mm1(rng, 200, 5000, 0.5)
    for share in (0.5, 0.9, 0.99):
        got = float(np.quantile((ends - arrivals)[:, 500:], share))
        assert got == pytest.approx(queues.mm1_time_in_system(0.5, share), rel=0.03)
    arrivals, starts, _ = queues.simulate_mdc(rng, 200, 5000, 0.8, 2)
    for share in (0.5, 0.9, 0.99):
        got = float(np.quantile((starts - arrivals)[:, 500:], share))
        assert got == pytest.approx(queues.mdc_wait(0.8, 2, share), rel=0.04)
    # M/D/1 by Erlang: P(no wait) is 1 - load
    assert queues.mdc_wait(0.6, 1, 0.39) == 0.0
    assert queues.mdc_wait(0.6, 1, 0.41) > 0.0


def coverage(
    queue: str, load: float, share: float, *, studies: int, launches: int, n: int, seed: int
) -> float:
    """The share of studies whose interval over launches holds the true percentile. Simulated in parts
    of 100 studies, to bound memory.
    """
    rng, held = np.random.default_rng(seed), 0
    servers = int(queue[-1])
    for _ in range(studies // 100):
        series = 100 * launches
        if queue == "M/M/1":
            arrivals, starts, ends = queues.simulate_mm1(rng, series, n, load)
            samples, truth = ends - arrivals, queues.mm1_time_in_system(load, share)
        else:
            arrivals, starts, _ = queues.simulate_mdc(rng, series, n, load, servers)
            samples, truth = starts - arrivals, queues.mdc_wait(load, servers, share)
        values = np.empty((100, launches))
        of_study = (
            samples.reshape(100, launches, n),
            (starts - arrivals).reshape(100, launches, n),
        )
        for number, (runs, waits) in enumerate(zip(*of_study, strict=True)):
            cut = steady_state.common_cut(list(waits)) or 0
            values[number] = np.quantile(runs[:, cut:], share, axis=1)
        low, high = t_interval(np.log(values), 0.05)
        held += int(((low <= np.log(truth)) & (np.log(truth) <= high)).sum())
    return held / studies


@pytest.mark.parametrize(
    ("queue", "load", "share", "n"),
    [("M/M/1", 0.5, 0.9, 3000), ("M/D/2", 0.7, 0.9, 3000), ("M/D/4", 0.5, 0.99, 6000)],
)
def test_intervals_over_launches_hold_the_percentiles_of_known_queues(
    queue: str, load: float, share: float, n: int
) -> None:
    found = coverage(queue, load, share, studies=500, launches=6, n=n, seed=20261129)
    print(f"{queue}, load {load}, p{100 * share:g}: {found:.1%}")
    assert 0.93 <= found <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("queue", "load"), [("M/M/1", 0.5), ("M/D/2", 0.6), ("M/D/4", 0.6)])
@pytest.mark.parametrize("share", [0.9, 0.99])
def test_intervals_over_launches_in_a_larger_simulation(
    queue: str, load: float, share: float
) -> None:
    found = coverage(queue, load, share, studies=1000, launches=8, n=10_000, seed=7)
    print(f"{queue}, load {load}, p{100 * share:g}: {found:.1%}")
    assert 0.93 <= found <= 0.97


def test_a_tail_with_too_few_effective_samples_is_not_claimed() -> None:
    """At a load of 0.8, 2,000 requests are worth far fewer: intervals would not hold p99, so there
    are none."""
    rng = np.random.default_rng(9)
    arrivals, starts, _ = queues.simulate_mdc(rng, 40, 2000, 0.8, 2)
    found = [under_load.quantile(series, 0.99) for series in starts - arrivals]
    assert sum(quantile.low is None for quantile in found) >= 36
    assert coverage("M/D/2", 0.8, 0.99, studies=200, launches=6, n=2000, seed=3) < 0.9


def test_intervals_within_a_launch_know_that_waiting_requests_are_not_independent() -> None:
    """Of the iid interval's ranks, far fewer than 95 % would hold; with the effective number, most."""
    rng = np.random.default_rng(3)
    arrivals, _, ends = queues.simulate_mm1(rng, 400, 4000, 0.5)
    truth = queues.mm1_time_in_system(0.5, 0.9)
    ranks = under_load.interval_ranks(4000, 0.9)
    held, naive = 0, 0
    for series in ends - arrivals:
        found = under_load.quantile(series, 0.9)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
        ordered = np.sort(series)
        naive += ordered[ranks[0] - 1] <= truth <= ordered[ranks[1] - 1]
    print(f"within a launch: {held / 400:.1%}, as if independent: {naive / 400:.1%}")
    assert 0.90 <= held / 400 <= 0.98
    assert naive / 400 < 0.8


def test_intervals_of_independent_samples_have_their_confidence() -> None:
    rng = np.random.default_rng(4)
    for share, n in ((0.5, 40), (0.9, 200), (0.99, 800)):
        low, high = under_load.interval_ranks(n, share)
        # the number of samples below the percentile is binomial
        exact = stats.binom.cdf(high - 1, n, share) - stats.binom.cdf(low - 1, n, share)
        assert 0.95 <= exact <= 0.98
        samples = np.sort(rng.random((2000, n)), axis=1)
        held = (samples[:, low - 1] <= share) & (share <= samples[:, high - 1])
        assert held.mean() == pytest.approx(exact, abs=0.015)


@pytest.mark.parametrize(("share", "needed"), [(0.5, 6), (0.9, 36), (0.99, 368), (0.01, 368)])
def test_a_tail_needs_samples(share: float, needed: int) -> None:
    assert under_load.samples_needed(share) == needed
    rng = np.random.default_rng(5)
    few = under_load.quantile(rng.random(needed - 1), share)
    assert (few.low, few.high, few.needed) == (None, None, needed)
    low, high = under_load.interval_ranks(needed, share)
    assert 1 <= low < high <= needed
    with pytest.raises(ValueError, match="allowed: above 0 and below 1"):
        under_load.samples_needed(1.0)


def test_overload_trends_and_short_runs_are_seen() -> None:
    rng = np.random.default_rng(6)

    def states(load: float, n: int, times: int) -> list[str]:
        found = []
        for _ in range(times // 6 + 1):
            study = [
                requests_of(*s) for s in zip(*queues.simulate_mm1(rng, 6, n, load), strict=True)
            ]
            start = under_load.transient(study)
            found += [under_load.steadiness(launch, start) for launch in study]
        return found[:times]

    assert states(2.0, 400, 20) == ["overloaded"] * 20
    assert states(1.3, 400, 20).count("overloaded") >= 18
    assert states(0.3, 40, 3) == ["too short"] * 3
    quiet = states(0.5, 500, 300)
    assert quiet.count("overloaded") <= 3
    print({state: quiet.count(state) for state in quiet})
    assert quiet.count("steady") >= 240
    assert quiet.count("trend") <= 20
    due = np.arange(200.0)
    slower = requests_of(due, due + 0.1 + due / 1000, due + 0.6)
    assert under_load.steadiness(slower, Transient(20, True)) == "trend"
    # it gets slower to its end: wherever one cuts, the rest is not steady
    assert under_load.transient([slower]) == Transient(0, False)
    assert under_load.steadiness(slower, under_load.transient([slower])) == "too short"


def work_of(requests: int, gaps_s: float = 0.1, first_s: float = 0.5) -> Any:
    times = [[n * 1.0, n + first_s, n + first_s + 2 * gaps_s] for n in range(requests)]
    return {
        "duration_s": times[-1][2],
        "output_tokens": 3 * requests,
        "num_requests": requests,
        "request_times_s": times,
        "load": {
            "token_gaps_us": pack([[first, first + gaps_s, last] for _, first, last in times]),
            "delivered": 1.0,
            "lateness_p99_s": 0.0,
        },
    }


def test_metrics_of_a_launch_count_from_the_due_time() -> None:
    values = under_load.of_launch(work_of(450), RULES, (50, 90, 99), 45)
    assert values["time_to_first_token_p99_s"] == pytest.approx(0.5)
    assert values["inter_token_latency_p50_s"] == pytest.approx(0.1)
    assert values["time_per_output_token_p90_s"] == pytest.approx(0.1)
    assert values["end_to_end_p99_s"] == pytest.approx(0.7)
    assert values["goodput_requests_per_s"] == pytest.approx(1.0)
    few = under_load.of_launch(work_of(100), RULES, (50, 90, 99), 10)
    assert "time_to_first_token_p99_s" not in few  # 368 requests are needed
    assert "time_to_first_token_p90_s" in few
    late = under_load.of_launch(work_of(100, first_s=3.5), RULES, (50,), 0)
    assert "goodput_requests_per_s" not in late  # 0 has no ratio; the table of the load shows it
    searched = work_of(100)
    searched["load"]["search"] = {"rate": 7.5, "failed": 8.0, "stopped": "within", "trials": []}
    assert under_load.of_launch(searched, RULES, (50,), 0)["sustainable_requests_per_s"] == 7.5


@settings(max_examples=50, deadline=None)
@given(
    due=st.lists(st.integers(0, 2000).map(lambda n: n / 100), min_size=2, max_size=20),
    waits=st.lists(st.floats(0.001, 3), min_size=20, max_size=20),
    limit=st.floats(0.001, 3),
)
def test_goodput_and_backlog_by_their_definitions(
    due: list[float], waits: list[float], limit: float
) -> None:
    due = sorted(due)
    first = np.array(due) + np.array(waits[: len(due)])
    requests = requests_of(np.array(due), first, first + 0.4)
    good = sum(wait <= limit for wait in first - np.array(due))
    span = due[-1] - due[0]
    got = under_load.goodput(requests, {"ttft_s": limit})
    assert (
        got is None if span == 0 else got == pytest.approx(good / len(due) * (len(due) - 1) / span)
    )
    ends = first + 0.4
    for n, moment in enumerate(due):
        inside = sum(a <= moment < b for a, b in zip(due, ends, strict=True))
        assert requests.backlog()[n] == inside


def test_the_front_keeps_what_nothing_beats() -> None:
    points = [(10, 1.0), (20, 2.0), (15, 3.0), (20, 2.5), (5, 1.0)]
    assert pareto_front(points) == [(10, 1.0), (20, 2.0)]


def test_energy_is_power_while_serving_times_the_time_over_tokens() -> None:
    samples = [
        {"time_s": t / 2, "gpus": [{"watts": 100.0 if t < 10 else 300.0}]} for t in range(40)
    ]
    work = {**work_of(10), "window_s": [6.0, 18.0]}
    record = {"telemetry": {"samples": samples}, "workloads": {"w": work}}
    (found,) = energy.of_workload(record, "w")
    assert found["source"] == "gpu"
    assert found["watts"] == 300.0
    assert found["joules_per_output_token"] == pytest.approx(300 * work["duration_s"] / 30)
    assert found["joules_per_request"] == pytest.approx(300 * work["duration_s"] / 10)
    samples[20]["gpus"][0]["watts"] = None
    assert energy.of_workload(record, "w")[0]["watts"] == 300.0
    work["window_s"] = [6.0, 6.4]  # too few samples to know
    assert energy.of_workload(record, "w") == []
    del work["window_s"]
    assert energy.of_workload(record, "w") == []
