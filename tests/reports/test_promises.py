"""A report does not take the word of a record: verdicts are recomputed from their own figures, and
what the methodology promises of every launch is checked again.
"""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.gate.chance.event_counts import evidence_of_count
from experiments.gate.rules import GateParams, judge
from experiments.gate.scoring import Scores
from experiments.gate.verdicts import Work, gate_record
from reports.analysis.analyse import analyse
from reports.analysis.gate_lines import DEFAULTS, contradictions
from reports.analysis.promises import PROMISES
from reports.claims.published_studies import folders
from tests.support.synthetic import factorial, make_plan, make_records

PLAN: Any = make_plan(
    factorial(),
    2,
    ("scaled", "shared"),
    validity={"foreign_gpu_processes": 0, "throttle": ["hw_thermal"], "max_foreign_cpu": 0.9},
)
METHODOLOGY = Path(__file__).parents[2] / "docs" / "methodology.md"


@cache
def published() -> list[tuple[Any, Any]]:
    """(plan, gate record) of every verdict that is published."""
    found = []
    for folder in folders():
        plan = json.loads((folder / "plan.json").read_text())
        for text in (folder / "records.jsonl").read_text().splitlines():
            if text.startswith(('{"kind": "gate"', '{"kind":"gate"')):
                found.append((plan, json.loads(text)))
    return found


# verdicts


def test_every_published_pass_follows_from_its_figures() -> None:
    assert len(published()) > 200
    for plan, line in published():
        assert line["status"] == "pass"
        assert list(contradictions(line, plan)) == []


def test_the_defaults_are_those_of_the_gate() -> None:
    assert {name: getattr(GateParams(), name) for name in DEFAULTS} == DEFAULTS


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    seed=st.integers(0, 2**30),
    wrong=st.sampled_from([0.0, 0.01, 0.3]),
    size=st.sampled_from([0.1, 1.0, 2.5]),
    unknown_noise=st.booleans(),
    factor=st.sampled_from([1.0, 2.0, 4.0]),
)
def test_what_the_gate_writes_is_believed(
    lengths: list[int], seed: int, wrong: float, size: float, unknown_noise: bool, factor: float
) -> None:
    """Whatever scores it judges: a pass follows from its figures, and a failure called a pass does
    not.
    """
    generator = torch.Generator().manual_seed(seed)
    params = GateParams(factor=factor)
    result = judge(
        [scores(n, generator, wrong, size, unknown_noise) for n in lengths], "float32", params
    )
    plan = {**PLAN, "gate": {"factor": factor}}
    line: Any = gate_record(plan, Work("scaled", "digest", ()), result)
    if result.passed:
        assert list(contradictions(line, plan)) == []
    else:
        called = {**line, "status": "pass", "reason": None, "first_offender": None}
        assert list(contradictions(called, plan)) != []


def scores(
    n: int, generator: torch.Generator, wrong: float, size: float, unknown_noise: bool
) -> Scores:
    """Scores of n tokens, of which a share is not the reference's choice; size: of their margins, in
    errors of HF.
    """
    error = torch.rand(n, generator=generator, dtype=torch.float64) * 1e-5
    differs = torch.rand(n, generator=generator) < wrong
    few = torch.arange(5).repeat(n, 1)
    log_p = -torch.rand(n, generator=generator, dtype=torch.float64)
    made = {
        "tokens": few[:, 0],
        "margin": torch.where(differs, size * error, torch.zeros_like(error)),
        "agrees": ~differs,
        "hf_agrees": torch.rand(n, generator=generator) >= 0.01,
        "error": error,
        "scale": torch.full((n,), 8.0, dtype=torch.float64),
        "unknown_noise": torch.full((n,), unknown_noise),
        "log_p": log_p,
        "entropy": torch.full_like(log_p, 0.5),
        "variance": torch.full_like(log_p, 0.1),
        "root_sum": torch.full_like(log_p, 0.2),
        "drift": torch.zeros_like(log_p),
        "near": torch.full_like(log_p, 0.01),
        "best": few,
        "hf_best": few,
        "best_scores": few.double(),
        "hf_best_scores": few.double(),
        "logprob": log_p,
        "hf_logprob": log_p,
    }
    return Scores(**made)


def times(factor: float) -> Any:
    return lambda value: value * factor


DRAWN = {
    "z": 0.1,
    "z_limit": 4.9,
    "largest_log_evidence": 1.0,
    "log_evidence_limit": 20.0,
    "tokens": 1,
}
OUTSIDE = {
    "outside": 3,
    "outside_explained": 9.0,
    "outside_log_evidence": evidence_of_count(3, 9.0),
    "outside_log_evidence_limit": -math.log(1e-6),
}
EDITS: dict[str, tuple[tuple[str, ...], Any]] = {
    "900 mismatches": (("mismatches",), lambda n: n + 900),
    "some explained": (("within_bound",), lambda n: n + 1),
    "a margin above its bound": (("max_margin",), lambda _: 9.9),
    "no margin": (("max_margin",), lambda _: None),
    "not a number": (("max_margin",), lambda _: math.nan),
    "a bound of its own": (("bound",), times(1000)),
    "no token": (("tokens_checked",), lambda _: 0),
    "a reason": (("reason",), lambda _: "1 of 8 tokens exceeds the bound"),
    "an offender": (("first_offender",), lambda _: {"request": 0}),
    "another dtype": (("dtype",), lambda d: "float64"),
    "HF's error": (("calibration", "hf_error", "max"), times(3)),
    "the floor": (("calibration", "floor"), lambda x: x + 1),
    "the factor": (("calibration", "factor"), times(2)),
    "the level": (("calibration", "alpha"), times(1e-3)),
    "the limit of z": (("calibration", "z_limit"), times(2)),
    "z": (("calibration", "excess_mismatches_z"), lambda _: 50.0),
    "many above the typical bound": (("calibration", "above_typical_bound"), lambda n: n + 5000),
    "many allowed": (("calibration", "allowed_above_typical_bound"), lambda n: n + 50),
    "another largest margin": (("calibration", "margin", "max"), lambda x: x + 0.5),
    "no numbers by position": (("calibration", "by_position"), lambda _: [{"tokens": None}]),
    "a distribution without figures": (("calibration", "distribution"), lambda _: {"z": 0.1}),
    "exchanged parameters": (
        ("calibration", "distribution"),
        lambda _: DRAWN | {"dispersion_z": 9.0, "dispersion_limit": 4.753424308822899},
    ),
    "another limit of the dispersion": (
        ("calibration", "distribution"),
        lambda _: DRAWN | {"dispersion_z": 9.0, "dispersion_limit": 40.0},
    ),
    "ends that are too unlikely": (
        ("calibration", "distribution"),
        lambda _: DRAWN | {"end_log_evidence": 20.0, "end_log_evidence_limit": -math.log(1e-6)},
    ),
    "tokens outside of what is kept": (
        ("calibration", "distribution"),
        lambda _: (
            DRAWN | OUTSIDE | {"outside": 60, "outside_log_evidence": evidence_of_count(60, 9.0)}
        ),
    ),
    "tokens outside that are not counted": (
        ("calibration", "distribution"),
        lambda _: DRAWN | OUTSIDE | {"outside": 60},
    ),
    "no number of tokens outside": (
        ("calibration", "distribution"),
        lambda _: DRAWN | OUTSIDE | {"outside": None},
    ),
    "a dispersion without its limit": (
        ("calibration", "distribution"),
        lambda _: DRAWN | {"dispersion_z": 0.0},
    ),
    "no calibration": (("calibration",), lambda _: {}),
}


@pytest.mark.parametrize("name", EDITS)
@settings(max_examples=8, deadline=None)
@given(chosen=st.deferred(lambda: st.sampled_from(published())))
def test_an_edited_pass_contradicts_itself(name: str, chosen: tuple[Any, Any]) -> None:
    plan, line = copy.deepcopy(chosen)
    (*path, last), edit = EDITS[name]
    place = line
    for key in path:
        place = place[key]
    place[last] = edit(place.get(last))
    assert list(contradictions(line, plan)) != []


def edited(kind: str, change: Any, which: int = 0) -> dict[str, Any]:
    """The analysis of a synthetic study of which one record was changed."""
    records = copy.deepcopy(RECORDS)
    change([record for record in records if record["kind"] == kind][which])
    return analyse(records, PLAN)


RECORDS: Any = make_records(PLAN, {"batching": 2.0})


def test_a_pass_that_contradicts_itself_is_a_failure_in_the_report() -> None:
    def change(line: Any) -> None:
        line.update(mismatches=900, max_margin=9.9)

    analysis = edited("gate", change)
    (row,) = [row for row in analysis["gate"]["rows"] if row["status"] != "pass"]
    assert row["status"] == "fail"
    assert "recorded as a pass, which its own figures contradict" in row["reason"]
    assert "the largest margin is 9.9" in row["reason"]
    assert analysis["counts"]["excluded_launches"] > 0
    assert all("contradict" in each["reason"] for each in analysis["excluded"])
    assert any("The gate did not pass 1 output" in each for each in analysis["answer"]["caveats"])


@pytest.mark.parametrize("by", [-1, 1])
def test_fewer_tokens_judged_than_generated_is_no_pass(by: int) -> None:
    def change(line: Any) -> None:
        line["tokens_checked"] += by

    analysis = edited("gate", change)
    assert analysis["counts"]["excluded_launches"] > 0
    assert all("tokens were judged" in each["reason"] for each in analysis["excluded"])


# launches


def fires(level: str, engaged: int, of: Any) -> Any:
    """Sets how often the toggles that are on, or off, engaged."""

    def change(record: Any) -> None:
        for toggles in of(record):
            for toggle in toggles.values():
                if (toggle["level"] == toggle["baseline"]) == (level == "off"):
                    toggle["engaged"] = engaged

    return change


def of_launch(record: Any) -> list[Any]:
    return [record["toggles"]]


def of_workloads(record: Any) -> list[Any]:
    return [work["toggles"] for work in record["workloads"].values()]


def sets(path: str, value: Any) -> Any:
    def change(record: Any) -> None:
        *keys, last = path.split("/")
        for key in keys:
            record = record[key]
        record[last] = value

    return change


def divides_all_times(record: Any) -> None:
    """What makes an engine look 1.5 times as fast, in everything but the samples of the machine."""
    for part in ("process_start_s", "load_s", "warm_up_s", "total_s"):
        record[part] /= 1.5
    for work in record["workloads"].values():
        work["duration_s"] /= 1.5
        work["request_times_s"] = [[t / 1.5 for t in r] for r in work["request_times_s"]]
        work["step_times_s"] = [[s / 1.5, a, b] for s, a, b in work["step_times_s"]]


def with_samples(change: Any) -> Any:
    """The machine was sampled twice a second until shortly before the end, as the sampler does."""

    def sampled(record: Any) -> None:
        count = int(2 * record["total_s"])
        record["telemetry"]["samples"] = [{"time_s": (i + 1) / 2} for i in range(count)]
        change(record)

    return sampled


def takes_an_hour(record: Any) -> None:
    record["total_s"] = 3600.0


BREAKS: list[tuple[str, str, Any, str]] = [
    ("as planned", "baseline", sets("requested", {"batching": "continuous"}), "requested"),
    ("as planned", "baseline", sets("seed", -1), "seed is -1"),
    ("as planned", "baseline", sets("engine", "vllm"), "engine is vllm"),
    ("toggles", "all", fires("on", 0, of_launch), "never engaged"),
    ("toggles", "all", fires("on", 0, of_workloads), "never engaged"),
    ("toggles", "baseline", fires("off", 3, of_launch), "engaged 3 times"),
    ("toggles", "baseline", fires("off", 3, of_workloads), "engaged 6 times"),
    ("undisturbed", "all", sets("telemetry/foreign_gpu_pids", [1234]), "other processes used its"),
    ("undisturbed", "all", sets("telemetry/throttle_reasons", ["hw_thermal"]), "throttled"),
    (
        "undisturbed",
        "all",
        sets("telemetry/summary/cpu_foreign", {"mean": 0.95}),
        "used 95% of the CPU",
    ),
    ("clocks", "all", with_samples(divides_all_times), "samples of the machine span"),
    ("clocks", "baseline", sets("load_s", 40.0), "its parts took"),
    ("clocks", "baseline", takes_an_hour, "the next launch started 600.0 s after it"),
    ("one code", "all", sets("provenance/code_digest", "e" * 64), "ran code eeeeeeeeeeee"),
    ("one boot", "all", sets("boot_id", "boot-2"), "ran on boot boot-2"),
]


@pytest.mark.parametrize(("promise", "cell", "change", "reason"), BREAKS)
def test_a_launch_that_breaks_a_promise_is_excluded(
    promise: str, cell: str, change: Any, reason: str
) -> None:
    records = copy.deepcopy(RECORDS)
    broken = next(r for r in records if r["kind"] == "launch" and r["cell"] == cell)
    change(broken)
    before, after = analyse(RECORDS, PLAN), analyse(records, PLAN)
    assert before["counts"]["excluded_launches"] == 0
    (row,) = after["excluded"]
    assert row["launch"] == broken["launch"]
    assert reason in row["reason"]
    assert after["counts"]["counted_launches"] == before["counts"]["counted_launches"] - 1


def test_a_sampled_launch_keeps_its_promises_and_one_that_was_scaled_does_not() -> None:
    """All launches of a study divided by the same factor change its throughputs, and no ratio: only
    another clock tells.
    """
    records = copy.deepcopy(RECORDS)
    for record in records:
        if record["kind"] == "launch":
            with_samples(lambda record: None)(record)
    assert analyse(records, PLAN)["counts"]["excluded_launches"] == 0
    for record in records:
        if record["kind"] == "launch":
            divides_all_times(record)
    assert analyse(records, PLAN)["counts"]["counted_launches"] == 0


def test_every_promise_has_its_test_and_is_on_the_page() -> None:
    assert {promise for promise, *_ in BREAKS} == {promise.name for promise in PROMISES}
    page = " ".join(METHODOLOGY.read_text().split())
    assert not [promise.words for promise in PROMISES if promise.words not in page]
