"""The answer of a report: a sentence for each workload, names that mean one thing, verdicts that fit
the interval beside them, and caveats.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from reports import text
from reports.analysis import names
from reports.analysis.analyse import analyse
from reports.analysis.answer import answer
from reports.page.overview import overview
from tests.support.synthetic import (
    BASE_LEVELS,
    ON,
    cell_of,
    designed,
    factorial,
    make_plan,
    make_records,
    one_at_a_time,
)

SPEEDUPS = {"prefix_cache": 1.0, "batching": 2.5, "tensor_parallel_size": 0.7, "hf": 0.8}


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Iterator[None]:
    """statsmodels collects garbage at every Holm adjustment: what other tests left behind need not
    be walked.
    """
    gc.freeze()
    yield
    gc.unfreeze()


def effects_of(analysis: dict[str, Any], cell: str) -> list[dict[str, Any]]:
    return [
        e for e in analysis["effects"] if e["metric"] == "output_tokens_per_s" and e["cell"] == cell
    ]


def test_the_strongest_interaction_is_told_with_the_answer() -> None:
    plan = make_plan(factorial(), 6)
    lines = make_records(plan, SPEEDUPS, sd=0.004, interactions={("prefix_cache", "batching"): 1.8})
    sentence = analyse(lines, plan)["answer"]["sentence"]
    pair = "batching=continuous and prefix_cache=on help each other (×1."
    assert f"strongest interaction: {pair}" in sentence


def test_an_interval_that_excludes_1_and_is_not_significant_is_called_suggestive() -> None:
    """What a reader sees beside the interval and what Holm's correction says are both in the sentence."""
    plan = make_plan(one_at_a_time(), 3)
    analysis = analyse(make_records(plan, {"batching": 1.2}, sd=0.03, seed=3), plan)
    effect = effects_of(analysis, cell="batching=continuous")[0]
    assert (effect["verdict"], effect["low"] > 1) == ("inconclusive", True)
    assert text.verdict(effect) == "suggestive"
    assert "batching=continuous comes first (×1." in analysis["answer"]["sentence"]
    everything = effects_of(analysis, cell="all")[0]
    assert text.verdict(everything) == "suggestive"
    assert (
        "suggestive, not significant after correction for 4 tests" in analysis["answer"]["sentence"]
    )
    assert text.verdict(effect | {"low": 0.9}) == "inconclusive"
    assert text.verdict(effect | {"low": None, "high": None}) == "inconclusive"
    assert text.verdict(effect | {"verdict": "faster"}) == "faster"


def test_a_switch_that_slows_everything_on_is_named() -> None:
    """Where everything on would be faster without one switch, the ratio of everything on hides it."""
    factors = list(ON)
    plan = make_plan(
        designed("both", factors),
        4,
        factors={name: {"baseline": off} for name, off in BASE_LEVELS.items()},
        design={"kind": "both"},
    )
    slow = {"prefix_cache": 3.0, "batching": 0.5, "tensor_parallel_size": 1.5}
    analysis = analyse(make_records(plan, slow, sd=0.002), plan)
    sentence = analysis["answer"]["by_workload"][0]["sentence"]
    assert "; batching=continuous, added last, makes it worse (×0.5" in sentence
    assert ", slower; without it ×4.5" in sentence
    elsewhere = make_plan(
        designed("both", factors),
        4,
        factors={
            name: {"baseline": off, "workloads": ["other"] if name == "batching" else []}
            for name, off in BASE_LEVELS.items()
        },
        design={"kind": "both"},
    )
    said = analyse(make_records(elsewhere, slow, sd=0.002), elsewhere)["answer"]["sentence"]
    assert "worse" not in said, "a switch that is not meant to act on this workload"
    helpful = analyse(make_records(plan, {**slow, "batching": 1.2}, sd=0.002), plan)
    assert "without" not in helpful["answer"]["sentence"]


def test_the_noisiest_workload_is_quoted() -> None:
    """Not the first, nor the one with the widest interval: the one whose twin is furthest from 1."""
    effects = [
        {"role": "aa", "metric": "output_tokens_per_s", "verdict": "inconclusive", "workload": name}
        | {"ratio": ratio, "low": low, "high": high}
        for name, ratio, low, high in (("mixed", 1.006, 0.58, 1.73), ("shared", 0.898, 0.81, 0.99))
    ]
    plan = make_plan(one_at_a_time(), 2)
    analysis = analyse(make_records(plan, SPEEDUPS), plan) | {"effects": effects}
    (noise,) = [caveat for caveat in answer(analysis)["caveats"] if caveat.startswith("Noise")]
    assert "reads ×0.898 (0.810 to 0.990) on shared." in noise


def test_a_noisy_machine_is_said() -> None:
    plan = make_plan(one_at_a_time(), 4)
    records = make_records(plan, SPEEDUPS, sd=0.1)
    launches = [record for record in records if record["kind"] == "launch"]
    for number, record in enumerate(launches):
        share = 0.4 if number < 3 else 0.0
        record["telemetry"]["summary"]["cpu_foreign"] = {"min": 0, "mean": share, "max": 1}
    caveats = analyse(records, plan)["answer"]["caveats"]
    assert any(
        "more than 20 % of the CPU during 3 of 28 counted launches (4 % on average)" in caveat
        for caveat in caveats
    )
    assert any(
        caveat.startswith("Noise: the A/A twin, which is all off run a second time, reads ×")
        for caveat in caveats
    )


def test_configurations_are_called_what_they_are() -> None:
    """`baseline` is everything off in one study and everything on in another."""
    plan = make_plan(one_at_a_time(), 2)
    records = make_records(plan, SPEEDUPS)
    for record in records:
        if record.get("cell") == "hf":
            record["resolved"]["version"] = "5.1"
    shown = analyse(records, plan)["shown"]
    assert shown == {
        "baseline": "all off",
        "baseline-again": "A/A twin",
        "prefix_cache=on": "prefix_cache=on",
        "batching=continuous": "batching=continuous",
        "tensor_parallel_size=2": "tensor_parallel_size=2",
        "all": "all on",
        "hf": "reference: HF 5.1",
    }
    assert names.baseline_name({"prefix_cache": "on", "tensor_parallel_size": 1}) == "all on"
    assert names.baseline_name({"prefix_cache": "on", "batching": "static"}) == "baseline"
    plan["cells"] |= cell_of("hf-eager", "reference", engine="hf")
    two = names.shown_names(plan, [])
    assert (two["hf"], two["hf-eager"]) == ("reference: HF", "reference: HF (eager)")


def test_what_could_not_run_is_told_once_a_reason() -> None:
    entries = [
        {"factor": "tensor_parallel_size", "level": 2, "reason": "needs 2 GPUs"},
        {"factor": "data_parallel_size", "level": 2, "reason": "needs 2 GPUs"},
        {"factor": "tp2", "level": "tensor_parallel_size=2", "reason": "needs 2 GPUs"},
        {"factor": "kernels", "level": "triton", "reason": "needs a GPU"},
    ]
    assert names.not_applicable({"not_applicable": entries}) == [
        ("needs 2 GPUs", ["tensor_parallel_size=2", "data_parallel_size=2", "tp2"]),
        ("needs a GPU", ["kernels=triton"]),
    ]


def test_a_row_for_each_switch_in_place_of_all_but_one() -> None:
    """Each ratio of the table is that of the two throughputs beside it, up to the kinds of mean."""
    factors = list(ON)
    plan = make_plan(
        designed("both", factors),
        4,
        factors={name: {"baseline": off} for name, off in BASE_LEVELS.items()},
        design={"kind": "both"},
    )
    effects = {"prefix_cache": 3.0, "batching": 0.5, "tensor_parallel_size": 1.5}
    analysis = analyse(make_records(plan, effects, sd=0.002), plan)
    results = next(section for section in overview(plan, analysis) if section.key == "results")
    rows = {row[1]: row for row in results.tables[0].rows}
    assert not [title for title in rows if "all-but" in title]
    assert {f"{factor}, {way}" for factor in factors for way in ("alone", "added last")} <= {*rows}
    for title, (_, _, rate, ratio, *_) in rows.items():
        if "→" in rate:
            below, above = (float(part.replace(",", "")) for part in rate.split(" → "))
            assert float(ratio.removeprefix("×")) == pytest.approx(above / below, rel=0.02), title
    words = " ".join(results.notes)
    assert "one optimization alone: " in words
    assert "added last or on top: " in words
