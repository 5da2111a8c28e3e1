"""The analysis against studies whose truth is known: what it says must be so, and as often as it
says.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments import workloads
from experiments.records.reading import read_records
from experiments.records.store import RecordError
from experiments.study import designs
from experiments.study.designs import choose_generators
from reports.analysis.analyse import ALL_WORKLOADS, analyse
from reports.analysis.names import left_out_together, on_both_sides
from reports.page.render import render
from reports.page.sections import results
from reports.statistics import ceiling
from reports.statistics.contrasts import Lattice, evaluate
from reports.statistics.intervals import Rule, bootstrap_interval, estimate, judge, verdict
from reports.statistics.metrics import harmonic_mean, of_launch
from tests.support.synthetic import (
    BASE_LEVELS,
    cell_of,
    designed,
    factorial,
    gate_line,
    make_plan,
    make_records,
    one_at_a_time,
)

RULE = Rule(alpha=0.05, smallest_effect=0.05, seed="test")
SPEEDUPS = {"prefix_cache": 1.0, "batching": 2.5, "tensor_parallel_size": 0.7, "hf": 0.8}


def effects_of(analysis: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    wanted.setdefault("metric", "output_tokens_per_s")
    return [
        effect
        for effect in analysis["effects"]
        if all(effect[key] == value for key, value in wanted.items())
    ]


# ------------------------------------------------------------------------------------- known truth,
# whole studies


@pytest.mark.parametrize("seed", range(3))
def test_planted_interactions_are_found_and_absent_ones_are_not(seed: int) -> None:
    plan = make_plan(factorial(), 6, seed=seed)
    records = make_records(
        plan, SPEEDUPS, seed, 0.01, interactions={("prefix_cache", "batching"): 1.2}
    )
    found = {(row["first"], row["second"]): row for row in analyse(records, plan)["interactions"]}
    planted = found.pop(("batching=continuous", "prefix_cache=on"))
    assert planted["verdict"] == "help each other"
    assert planted["low"] < 1.2 < planted["high"]
    assert {row["verdict"] for row in found.values()} <= {"independent", "inconclusive"}
    assert len(found) == 2


def test_planted_effects_are_found_with_their_sizes_and_verdicts() -> None:
    plan = make_plan(one_at_a_time(), 8, ("scaled", "shared"))
    analysis = analyse(make_records(plan, SPEEDUPS, seed=3), plan)
    for cell, truth, expected in (
        ("batching=continuous", 2.5, "faster"),
        ("tensor_parallel_size=2", 0.7, "slower"),
        ("prefix_cache=on", 1.0, "equivalent"),
        ("baseline-again", 1.0, "equivalent"),
        ("all", 1.75, "faster"),
    ):
        for effect in effects_of(analysis, cell=cell):
            assert effect["verdict"] == expected, effect
            assert effect["ratio"] == pytest.approx(truth, rel=0.02)
            assert effect["low"] < effect["ratio"] < effect["high"]
            assert effect["boot_low"] == pytest.approx(effect["low"], rel=0.02)
    assert {effect["workload"] for effect in effects_of(analysis)} == {
        "scaled",
        "shared",
        ALL_WORKLOADS,
    }
    references = {(row["cell"], row["workload"]): row for row in analysis["references"]}
    assert references["baseline", "scaled"]["ratio"] == pytest.approx(1 / 0.8, rel=0.02)
    assert references["all", "scaled"]["ratio"] == pytest.approx(1.75 / 0.8, rel=0.02)
    on_scaled, on_shared = (part["sentence"] for part in analysis["answer"]["by_workload"])
    held = "prefix_cache=on, batching=continuous, tensor_parallel_size=2"
    assert on_scaled.startswith(f"On scaled, everything on ({held}) gives 1.7")
    assert on_shared.startswith("On shared, everything on gives 1.7")
    for sentence in (on_scaled, on_shared):
        assert "times the output tokens per second of all off (95 % interval 1." in sentence
        assert "on its own, batching=continuous helps most (×2." in sentence
    assert analysis["answer"]["sentence"] == f"{on_scaled} {on_shared}"
    json.dumps(analysis, allow_nan=False)


def test_latency_is_judged_in_its_own_direction() -> None:
    plan = make_plan(one_at_a_time(), 4)
    analysis = analyse(make_records(plan, SPEEDUPS), plan)
    for key in ("time_to_first_token_p50_s", "time_per_output_token_p99_s"):
        (effect,) = effects_of(analysis, metric=key, cell="batching=continuous")
        assert effect["verdict"] == "faster"
        assert effect["ratio"] == pytest.approx(1 / 2.5, rel=0.05)


def test_a_study_may_be_about_latency() -> None:
    plan = make_plan(one_at_a_time(), 4, metric="time_to_first_token_p50_s")
    analysis = analyse(make_records(plan, SPEEDUPS), plan)
    assert analysis["answer"]["verdict"] == "faster"
    assert "time to first token" in analysis["answer"]["sentence"]


# ------------------------------------------------------------------------------------------------------
# one effect


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.97, 1.03, 0.9, "equivalent"),
        (1.01, 1.04, 0.001, "equivalent"),  # a real difference that does not matter
        (1.02, 1.09, 0.01, "faster"),
        (0.80, 0.90, 0.001, "slower"),
        (0.97, 1.09, 0.4, "inconclusive"),
        (1.02, 1.09, 0.08, "inconclusive"),  # the interval excludes 1, the family's test does not
        (0.94, 1.04, 0.4, "inconclusive"),
        (None, None, None, "inconclusive"),
    ],
)
def test_verdicts(low: float | None, high: float | None, p: float | None, expected: str) -> None:
    assert verdict(low, high, p, RULE) == expected
    opposite = {"faster": "slower", "slower": "faster"}.get(expected, expected)
    assert verdict(low, high, p, RULE, "lower") == opposite


def test_the_estimate_is_scipys() -> None:
    sample = np.array([0.1, 0.13, 0.08, 0.11, 0.2, 0.09])
    effect = estimate(dict(enumerate(sample)), RULE, "x")
    reference = stats.ttest_1samp(sample, 0)
    assert effect["p"] == pytest.approx(reference.pvalue)
    assert [math.log(effect["low"]), math.log(effect["high"])] == pytest.approx(
        list(reference.confidence_interval())
    )
    assert effect["ratio"] == pytest.approx(stats.gmean(np.exp(sample)))


def test_no_interval_from_one_block_and_no_bootstrap_from_few() -> None:
    one = estimate({0: 0.1}, RULE, "x")
    assert one["low"] is None
    judge([one], RULE)
    assert one["verdict"] == "inconclusive"
    assert estimate({}, RULE, "x")["ratio"] is None
    assert estimate(dict.fromkeys(range(5), 0.1), RULE, "x")["boot_low"] is None


def test_no_spread_is_no_error() -> None:
    same = estimate(dict.fromkeys(range(6), 0.0), RULE, "x")
    other = estimate(dict.fromkeys(range(6), 1.0), RULE, "x")
    judge([same], RULE)
    judge([other], RULE)
    assert (same["p"], same["verdict"]) == (1.0, "equivalent")
    assert (other["p"], other["verdict"], other["low"]) == (0.0, "faster", other["high"])


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    sample = np.array([0.1, 0.13, 0.08, 0.11, 0.2, 0.09])
    assert bootstrap_interval(sample, 0.05, "a") == bootstrap_interval(sample, 0.05, "a")
    assert bootstrap_interval(sample, 0.05, "a") != bootstrap_interval(sample, 0.05, "b")


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="smallest_effect"):
        Rule(smallest_effect=0)
    with pytest.raises(ValueError, match="alpha"):
        Rule(alpha=1.0)


def test_rates_are_averaged_by_their_times() -> None:
    assert harmonic_mean([100.0, 50.0]) == pytest.approx(2 / (1 / 100 + 1 / 50))
    plan = make_plan(one_at_a_time(reference=False), 2)
    records = make_records(plan, {})
    rates = [
        record["workloads"]["scaled"]["output_tokens"] / record["workloads"]["scaled"]["duration_s"]
        for record in records
        if record.get("cell") == "baseline"
    ]
    (row,) = [
        row
        for row in analyse(records, plan)["rates"]
        if row["cell"] == "baseline" and row["metric"] == "output_tokens_per_s"
    ]
    assert row["mean"] == pytest.approx(harmonic_mean(rates))


def test_time_per_output_token_needs_the_lengths() -> None:
    work = {"output_tokens": 7, "duration_s": 2.0, "request_times_s": [[0, 1, 2], [0, 0.5, 1.0]]}
    assert of_launch(work, [5, 2])["time_per_output_token_p50_s"] == pytest.approx(
        (1 / 4 + 0.5) / 2
    )
    # stopped early: the record holds only the sum
    assert "time_per_output_token_p50_s" not in of_launch(work, [5, 3])
    assert "time_per_output_token_p50_s" not in of_launch(work, None)


# ------------------------------------------------------------------------------------------------------
# whole designs


def test_shapley_shares_multiply_to_the_whole_effect() -> None:
    plan = make_plan(factorial(), 3)
    analysis = analyse(
        make_records(plan, SPEEDUPS, interactions={("prefix_cache", "batching"): 1.3}), plan
    )
    shares = [row["ratio"] for row in analysis["factors"] if row["kind"] == "Shapley"]
    (everything,) = effects_of(analysis, cell="all")
    assert len(shares) == 3
    assert math.prod(shares) == pytest.approx(everything["ratio"])


def test_one_at_a_time_tells_no_company() -> None:
    plan = make_plan(one_at_a_time(), 3)
    analysis = analyse(make_records(plan, SPEEDUPS), plan)
    assert {row["kind"] for row in analysis["factors"]} == {"alone"}
    assert analysis["interactions"] == []


def test_leave_one_out_is_read_from_the_cells_without_a_factor() -> None:
    lattice = Lattice(factorial())
    contrast = lattice.factor_contrasts()["left out"]["batching", "continuous"]
    assert contrast == {"all": 1.0, "prefix_cache+tensor_parallel_size": -1.0}
    values = {"all": {0: 3.0, 1: 4.0}, "prefix_cache+tensor_parallel_size": {1: 1.0, 2: 2.0}}
    assert evaluate(contrast, values) == {1: 3.0}


def test_a_factor_that_another_needs_is_compared_without_both() -> None:
    """`deep` needs `base`: all-but-base is without deep as well, and its partner is the cell that
    lacks deep alone.
    """
    names = {
        "baseline": "",
        "base": "base",
        "all": "base other deep",
        "all-but-base": "other",
        "all-but-deep": "base other",
        "all-but-other": "base deep",
        "all+ranks": "base other deep ranks",
    }
    every = ("base", "other", "deep", "ranks")
    levels = {
        name: {f: "on" if f in on.split() else "off" for f in every} for name, on in names.items()
    }
    roles = {"baseline": "baseline", "all": "all"}
    cells = {
        name: {"engine": "nanovllm", "levels": found, "role": roles.get(name, "treatment")}
        for name, found in levels.items()
    }
    lattice = Lattice(cells)
    left_out = lattice.factor_contrasts()["left out"]
    assert left_out["base", "on"] == {"all-but-deep": 1.0, "all-but-base": -1.0}
    assert left_out["deep", "on"] == {"all": 1.0, "all-but-deep": -1.0}
    assert left_out["other", "on"] == {"all": 1.0, "all-but-other": -1.0}
    assert left_out["ranks", "on"] == {"all+ranks": 1.0, "all": -1.0}, (
        "no part of everything on: on top of it"
    )
    assert lattice.company(("base", "on")) == {("other", "on")}
    assert left_out_together({"baseline": "baseline", "cells": cells}) == [
        "all-but-base switches deep off as well: deep needs base."
    ]


def test_what_both_sides_of_added_last_share_is_said() -> None:
    """One sentence for all toggles that share the same company."""
    rows = [
        {"kind": "left out", "factor": factor, **company}
        for factor, company in (
            ("graphs", {"without": ["cascade=on"]}),
            ("prefix", {"without": ["cascade=on"]}),
            ("overlap", {}),
            ("all_reduce", {"beside": ["tp=2"], "part_of_all": False}),
        )
    ] + [{"kind": "alone", "factor": "graphs"}]
    assert on_both_sides({"factors": rows}) == [
        "graphs and prefix, added last: cascade=on needs them, so it is off in both configurations.",
        "all_reduce, on top: it needs tp=2, which is on in both configurations.",
    ]


def test_the_table_of_factors_says_in_what_company_each_was_measured() -> None:
    """End to end, from a plan with a factor that needs another and one that stands apart."""
    off = {
        "attention_backend": "off",
        "kernels": "off",
        "cascade_attention": "off",
        "tensor_parallel_size": 1,
    }
    on: dict[str, list[Any]] = {
        name: ["on"] for name in ("attention_backend", "kernels", "cascade_attention")
    }
    on["tensor_parallel_size"] = [2]

    def can_run(point: Any) -> bool:
        return point["cascade_attention"] == "off" or point["attention_backend"] == "on"

    made = designs.cells("both", off, on, {}, apart=("tensor_parallel_size",), can_run=can_run)
    points = {
        "baseline": ("baseline", off),
        "aa": ("aa", off),
        **{n: c for n, c in made.items() if can_run(c[1])},
    }
    cells = {
        n: {"engine": "nanovllm", "config": dict(p), "levels": p, "role": role}
        for n, (role, p) in points.items()
    }
    factors = {name: {"baseline": off[name], "levels": on[name]} for name in off}
    plan = make_plan(cells, 4, factors=factors, design={"kind": "both"})
    analysis = analyse(
        make_records(plan, {"attention_backend": 2.0, "tensor_parallel_size": 1.5}, sd=0.002), plan
    )
    rows = {(row["factor"], row["kind"]): row for row in analysis["factors"]}
    assert rows["attention_backend", "left out"]["without"] == ["cascade_attention=on"]
    assert rows["attention_backend", "left out"]["ratio"] == pytest.approx(2.0, rel=0.02)
    assert rows["tensor_parallel_size", "left out"]["part_of_all"] is False
    assert rows["tensor_parallel_size", "left out"]["ratio"] == pytest.approx(1.5, rel=0.02)
    assert ("cascade_attention", "alone") not in rows
    (section,) = (found for found in results(analysis) if found.key == "factors")
    measured = {row[2] for table in section.tables for row in table.rows}
    assert measured == {
        "alone",
        "added last",
        "added last, without cascade_attention=on",
        "on top of all",
    }


def test_leave_one_out_starts_from_everything_on() -> None:
    factors = ["prefix_cache", "batching", "tensor_parallel_size"]
    plan = make_plan(
        designed("leave_one_out", factors),
        4,
        factors=off_levels(factors),
        design={"kind": "leave_one_out"},
    )
    analysis = analyse(make_records(plan, SPEEDUPS | {"tensor_parallel_size": 1.2}, sd=0.005), plan)
    assert analysis["baseline"] == "all"
    (without,) = effects_of(analysis, cell="all-but-batching")
    assert (without["verdict"], without["ratio"]) == ("slower", pytest.approx(1 / 2.5, rel=0.02))
    found = {row["factor"]: row for row in analysis["factors"]}
    assert {row["kind"] for row in analysis["factors"]} == {"left out"}
    assert found["batching"]["ratio"] == pytest.approx(2.5, rel=0.02)
    assert found["tensor_parallel_size"]["verdict"] == "faster"
    assert effects_of(analysis, role="aa")[0]["verdict"] == "equivalent"
    sentence = analysis["answer"]["sentence"]
    assert sentence.startswith("On scaled, all-but-batching gives 0.4")
    assert "of all on (95 % interval" in sentence, "a baseline with everything on is called so"
    assert "the largest of 2 losses among 3 changes" in sentence


@pytest.mark.parametrize(
    ("metric", "found"), [("output_tokens_per_s", "0."), ("time_to_first_token_p50_s", "2.")]
)
def test_where_nothing_gains_the_largest_loss_is_told(metric: str, found: str) -> None:
    cells = cell_of("baseline", "baseline") | cell_of("cached", "treatment", ["prefix_cache"])
    cells |= cell_of("both", "treatment", ["prefix_cache", "batching"])
    plan = make_plan(cells, 6, metric=metric)
    sentence = analyse(make_records(plan, {"prefix_cache": 0.8, "batching": 0.5}, sd=0.004), plan)[
        "answer"
    ]["sentence"]
    start = "On scaled, nothing tested is significantly faster than all off: of 2 changes, 2 slower; the largest loss: both gives "
    assert sentence.startswith(start + found)


def test_an_aa_arm_that_differs_in_another_metric_is_said() -> None:
    plan = make_plan(
        cell_of("baseline", "baseline")
        | cell_of("again", "aa")
        | cell_of("cached", "treatment", ["prefix_cache"]),
        6,
    )
    records = make_records(plan, {"prefix_cache": 2.0}, sd=0.004)
    clean = analyse(copy.deepcopy(records), plan)["answer"]["caveats"]
    assert not any("A/A twin differs" in caveat for caveat in clean)
    for record in records:
        if record["kind"] == "launch" and record["cell"] == "again":
            for request in record["workloads"]["scaled"]["request_times_s"]:
                request[1] = request[0] + 2 * (request[1] - request[0])
    caveats = analyse(records, plan)["answer"]["caveats"]
    assert any(
        caveat.startswith("The A/A twin differs from all off in time to first token")
        for caveat in caveats
    )


def test_a_lowered_clock_is_said_with_its_reason() -> None:
    plan = make_plan(
        cell_of("baseline", "baseline") | cell_of("cached", "treatment", ["prefix_cache"]), 3
    )
    records = make_records(plan, {"prefix_cache": 2.0})
    first, second, *_ = (record for record in records if record["kind"] == "launch")
    first["telemetry"]["throttle_reasons"] = ["power_cap", "sw_thermal"]
    second["telemetry"]["throttle_reasons"] = ["power_cap"]
    caveats = analyse(records, plan)["answer"]["caveats"]
    assert (
        "The GPU lowered its clock during 2 of 6 counted launches: power cap in 2, sw thermal in 1."
        in caveats
    )


def test_both_directions_stand_side_by_side_and_differ_by_the_interaction() -> None:
    factors = ["prefix_cache", "batching", "tensor_parallel_size", "overlap"]
    plan = make_plan(designed("both", factors), 4, factors=off_levels(factors))
    records = make_records(
        plan, SPEEDUPS, sd=0.005, interactions={("prefix_cache", "batching"): 1.2}
    )
    found = {
        (row["kind"], row["factor"]): row["ratio"] for row in analyse(records, plan)["factors"]
    }
    assert found["alone", "batching"] == pytest.approx(2.5, rel=0.02)
    assert found["left out", "batching"] == pytest.approx(2.5 * 1.2, rel=0.02)
    assert set(found) == {(kind, factor) for kind in ("alone", "left out") for factor in factors}


def off_levels(factors: list[str]) -> dict[str, Any]:
    """`study.factors` of a plan, as far as the analysis reads it."""
    return {factor: {"baseline": BASE_LEVELS.get(factor, "off")} for factor in factors}


def test_a_fraction_finds_main_effects_and_names_what_it_mixes(tmp_path: Path) -> None:
    factors = ["prefix_cache", "batching", "kernels", "overlap"]
    generators = choose_generators(factors, 4)
    design = {"kind": "fractional_factorial", "generators": generators}
    plan = make_plan(
        designed("fractional_factorial", factors, generators),
        4,
        factors=off_levels(factors),
        design=design,
    )
    records = make_records(
        plan,
        {"batching": 2.5, "kernels": 0.7},
        sd=0.005,
        interactions={("prefix_cache", "overlap"): 1.3},
    )
    analysis = analyse(records, plan)
    average = {row["factor"]: row for row in analysis["factors"] if row["kind"] == "average"}
    assert average["batching"]["ratio"] == pytest.approx(2.5, rel=0.02)
    assert average["kernels"]["verdict"] == "slower"
    assert average["overlap"]["ratio"] == pytest.approx(math.sqrt(1.3), rel=0.02), (
        "on half of its cells prefix_cache is on"
    )
    assert analysis["interactions"] == [], "each pair is mixed with another one"
    _, page = render(plan, records, analysis, tmp_path)
    assert "prefix_cache*overlap + batching*kernels" in page.read_text().replace("<wbr />", "")
    model = {tuple(row["terms"]): row for row in analysis["linear_model"]}
    mixed = model["prefix_cache*overlap", "batching*kernels"]
    assert (mixed["verdict"], mixed["ratio"]) == ("help each other", pytest.approx(1.3, rel=0.03))
    assert {row["verdict"] for terms, row in model.items() if len(terms) == 2} == {
        "help each other",
        "independent",
    }
    for row in analysis["linear_model"][:4]:
        assert row["ratio"] == pytest.approx(average[row["terms"][0]]["ratio"])
        assert row["df"] == 7 * 3


def test_the_linear_model_agrees_with_the_contrasts_of_a_full_factorial() -> None:
    plan = make_plan(factorial(), 5)
    analysis = analyse(
        make_records(plan, SPEEDUPS, interactions={("prefix_cache", "batching"): 1.2}), plan
    )
    model = {row["terms"][0]: row["ratio"] for row in analysis["linear_model"]}
    for row in analysis["factors"]:
        if row["kind"] == "average":
            assert model[row["factor"]] == pytest.approx(row["ratio"])
    for row in analysis["interactions"]:
        pair = {row[side].partition("=")[0] for side in ("first", "second")}
        assert next(
            ratio for term, ratio in model.items() if set(term.split("*")) == pair
        ) == pytest.approx(row["ratio"])
    assert {row["df"] for row in analysis["linear_model"]} == {7 * 4}


def test_a_fraction_with_a_lost_cell_says_less_but_nothing_wrong() -> None:
    factors = ["prefix_cache", "batching", "kernels", "overlap"]
    generators = choose_generators(factors, 4)
    design = {"kind": "fractional_factorial", "generators": generators}
    plan = make_plan(
        designed("fractional_factorial", factors, generators),
        3,
        factors=off_levels(factors),
        design=design,
    )
    records = make_records(plan, {"batching": 2.5}, sd=0.005)
    lost = "kernels=on+overlap=on"
    some = analyse([r for r in records if r.get("cell") != lost or r["block"] == 0], plan)
    assert {row["n"] for row in some["factors"] if row["kind"] == "average"} == {1}
    assert next(row for row in some["linear_model"] if row["terms"] == ["batching"])[
        "ratio"
    ] == pytest.approx(2.5, rel=0.02)
    assert analyse([r for r in records if r.get("cell") != lost], plan)["linear_model"] == []


def test_a_plan_has_one_baseline() -> None:
    with pytest.raises(ValueError, match="exactly one baseline"):
        Lattice({name: cell for name, cell in factorial().items() if name != "baseline"})


def test_residuals_tell_normal_noise_from_skew_and_name_the_odd_one_out() -> None:
    plan = make_plan(one_at_a_time(), 12)
    normal = analyse(make_records(plan, SPEEDUPS, sd=0.02), plan)["residuals"]["scaled"]
    assert normal["n"] == 12 * 7
    assert normal["sd"] == pytest.approx(0.02, rel=0.2)
    assert normal["p_normal"] > 0.05
    plan = make_plan(one_at_a_time(), 40)
    skewed = analyse(make_records(plan, SPEEDUPS, sd=0.02, kind="skewed"), plan)["residuals"][
        "scaled"
    ]
    assert skewed["p_normal"] < 0.01
    assert skewed["skewness"] < -0.5, "rates: the long tail is on the slow side"
    records = make_records(plan, SPEEDUPS, sd=0.001)
    odd = next(record for record in records if record.get("cell") == "hf" and record["block"] == 5)
    odd["workloads"]["scaled"]["duration_s"] *= 1.5
    found = analyse(records, plan)["residuals"]["scaled"]
    assert (found["cell"], found["block"], found["largest"] < -5) == ("hf", 5, True)
    assert (
        analyse(make_records(make_plan(one_at_a_time(), 2), {}), make_plan(one_at_a_time(), 2))[
            "residuals"
        ]
        == {}
    )


# ------------------------------------------------------------------------------------------------------
# what counts


@pytest.fixture
def study() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    plan = make_plan(one_at_a_time(), 3)
    return plan, make_records(plan, SPEEDUPS)


def reasons(analysis: dict[str, Any]) -> list[str]:
    assert analysis["counts"]["counted_launches"] + analysis["counts"]["excluded_launches"] > 0
    return [row["reason"] for row in analysis["excluded"]]


def test_everything_counts_in_a_clean_study(study: Any) -> None:
    plan, records = study
    counts = analyse(records, plan)["counts"]
    assert (counts["counted_launches"], counts["excluded_launches"], counts["complete_blocks"]) == (
        21,
        0,
        3,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "failed", "reason": "exit code 137"}, "failed: exit code 137"),
        (
            {"status": "invalid", "reason": "overlap never engaged"},
            "invalid: overlap never engaged",
        ),
        ({"plan_hash": "0" * 64}, "ran under another plan"),
        ({"launch": "b99-o99-x"}, "not in the plan"),
        ({"block": 2}, "the plan puts"),
        ({"workloads": {}}, "did not serve scaled"),
    ],
)
def test_a_launch_that_breaks_a_rule_is_listed_and_not_counted(
    study: Any, change: dict[str, Any], reason: str
) -> None:
    plan, records = study
    records[0] |= change
    analysis = analyse(records, plan)
    assert analysis["counts"]["counted_launches"] == 20
    assert [reason in found for found in reasons(analysis)] == [True]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"output_tokens": 3}, "output tokens"),
        ({"fingerprint": "other"}, "fingerprint"),
        ({"duration_s": 0.01}, "last finish"),
        ({"request_times_s": [[0.0, 0.5, 0.4]]}, "arrival <= first token <= finish"),
        ({"finish_reasons": {"length": 3}}, "every request finished"),
        ({"counters": {"steps": -1}}, "counters are not negative"),
        ({"num_requests": 7}, "num_requests"),
    ],
)
def test_a_record_that_contradicts_itself_is_no_evidence(
    study: Any, change: dict[str, Any], check: str
) -> None:
    plan, records = study
    records[4]["workloads"]["scaled"] |= change
    analysis = analyse(records, plan)
    assert ["contradicts itself" in found and check in found for found in reasons(analysis)] == [
        True
    ]
    assert analysis["checks"]["failed"][0]["hard"]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"prefill_tokens": 7}, "prompt tokens are computed or found"),
        ({"preemptions": 1}, "admissions are requests and preemptions"),
        ({"prefix_hit_tokens": 9, "prefill_tokens": -9}, "hits among what was looked up"),
        ({"steps": 1}, "every step has a time"),
    ],
)
def test_counters_that_disagree_with_the_work_are_noted(
    study: Any, change: dict[str, int], check: str
) -> None:
    plan, records = study
    work = records[4]["workloads"]["scaled"]
    work["counters"] = {
        "prefill_tokens": work["prompt_tokens"],
        "prefix_hit_tokens": 0,
        "prefix_lookup_tokens": 0,
        "preemptions": 0,
        "admissions": work["num_requests"],
        "steps": len(work["step_times_s"]),
    }
    assert not analyse(records, plan)["checks"]["failed"]
    work["counters"] |= {name: work["counters"][name] + value for name, value in change.items()}
    assert [row["check"] for row in analyse(records, plan)["checks"]["failed"]] == [check]


def test_a_step_clock_that_disagrees_is_noted_but_counts(study: Any) -> None:
    plan, records = study
    for step in records[4]["workloads"]["scaled"]["step_times_s"]:
        step[0] *= 2
    analysis = analyse(records, plan)
    assert analysis["counts"]["excluded_launches"] == 0
    assert {row["check"] for row in analysis["checks"]["failed"]} == {
        "steps fit in the duration",
        "Little's law: decode integral <= residence",
    }
    assert any("consistency check" in caveat for caveat in analysis["answer"]["caveats"])


@pytest.mark.parametrize(("overlapped_steps", "noted"), [(0, True), (9, False)])
def test_with_overlap_a_step_may_have_the_time_of_the_one_before(
    study: Any, overlapped_steps: int, noted: bool
) -> None:
    """A long prefill whose time is written to the decode step that was launched behind it."""
    plan, records = study
    work = records[4]["workloads"]["scaled"]
    (first, *_), decodes = work["step_times_s"], [step for step in work["step_times_s"] if step[2]]
    assert first[2] == 0
    first[0], decodes[0][0] = (
        decodes[0][0],
        sum(arrival[2] - arrival[1] for arrival in work["request_times_s"]),
    )
    work["counters"] = {"overlapped_steps": overlapped_steps}
    found = {row["check"] for row in analyse(records, plan)["checks"]["failed"]}
    assert ("Little's law: decode integral <= residence" in found) == noted


def test_a_failed_gate_excludes_the_launches_that_made_these_tokens(study: Any) -> None:
    plan, records = study
    digest = records[0]["workloads"]["scaled"]["tokens_digest"]
    makers = sum(
        record.get("workloads", {}).get("scaled", {}).get("tokens_digest") == digest
        for record in records
    )
    (line,) = [
        record
        for record in records
        if record["kind"] == "gate" and record["tokens_digest"] == digest
    ]
    line |= {"status": "fail", "reason": "margin over the bound"}
    analysis = analyse(records, plan)
    assert analysis["counts"]["excluded_launches"] == makers
    assert set(reasons(analysis)) == {"gate: fail on scaled: margin over the bound"}
    # Judged again, the later word counts, as in experiments/gate/judge.py.
    assert (
        analyse([*records, gate_line(plan, "scaled", digest)], plan)["counts"]["excluded_launches"]
        == 0
    )


def test_tokens_that_the_gate_never_saw_do_not_count(study: Any) -> None:
    plan, records = study
    analysis = analyse([record for record in records if record["kind"] != "gate"], plan)
    assert analysis["counts"]["counted_launches"] == 0
    assert set(reasons(analysis)) == {"the gate did not check its tokens (scaled)"}


def test_a_negative_control_passes_nothing(study: Any) -> None:
    plan, records = study
    for record in records:
        if record["kind"] == "gate":
            record["is_negative_control"] = True
    analysis = analyse(records, plan)
    assert analysis["counts"]["counted_launches"] == 0
    assert any(
        "deliberately broken engine was not caught" in caveat
        for caveat in analysis["answer"]["caveats"]
    )


def test_duplicates_are_counted_once(study: Any) -> None:
    plan, records = study
    clean = analyse(records, plan)
    doubled = analyse([*records, *copy.deepcopy(records)], plan)
    assert doubled["counts"] == clean["counts"] | {"duplicates": 21}
    assert doubled["effects"] == clean["effects"]


def test_two_different_records_of_one_attempt_count_once(study: Any) -> None:
    plan, records = study
    analysis = analyse([*records, records[0] | {"seed": 1}], plan)
    assert analysis["counts"]["counted_launches"] == 21
    assert reasons(analysis) == ["another record of the same launch and attempt came first"]


def test_superseded_launches_are_listed_and_their_rerun_counts(study: Any) -> None:
    plan, records = study
    head = {"kind": "superseded", "schema": 1, "study": "synthetic", "plan_hash": plan["plan_hash"]}
    mark = {**head, "launch": records[0]["launch"], "attempt": 1, "reason": "another boot"}
    analysis = analyse([*records, mark, records[0] | {"attempt": 2}], plan)
    assert analysis["counts"]["counted_launches"] == 21
    assert reasons(analysis) == ["superseded: another boot"]


@pytest.mark.parametrize(("first", "counted"), [("failed", 21), ("invalid", 20), ("ok", 21)])
def test_the_first_attempt_that_finished_decides(study: Any, first: str, counted: int) -> None:
    plan, records = study
    records[0] |= {"status": first, "reason": "x"}
    analysis = analyse([*records, records[0] | {"status": "ok", "attempt": 2}], plan)
    assert analysis["counts"]["counted_launches"] == counted


def test_missing_cells_leave_the_other_effects_alone(study: Any) -> None:
    plan, records = study
    kept = [
        record
        for record in records
        if record.get("cell") != "batching=continuous"
        and record.get("launch") != records[0]["launch"]
    ]
    analysis = analyse(kept, plan)
    (missing,) = effects_of(analysis, cell="batching=continuous")
    assert (missing["n"], missing["ratio"], missing["verdict"]) == (0, None, "inconclusive")
    assert effects_of(analysis, cell="tensor_parallel_size=2")[0]["verdict"] == "slower"
    assert any("Incomplete" in caveat for caveat in analysis["answer"]["caveats"])


def test_a_single_block_is_inconclusive() -> None:
    plan = make_plan(one_at_a_time(), 1)
    analysis = analyse(make_records(plan, SPEEDUPS), plan)
    assert {effect["verdict"] for effect in analysis["effects"]} == {"inconclusive"}
    assert "too few for an interval" in analysis["answer"]["sentence"]


def test_without_any_counted_launch_there_is_no_answer(study: Any) -> None:
    plan, records = study
    for record in records:
        if record["kind"] == "launch":
            record["status"] = "failed"
    assert (
        analyse(records, plan)["answer"]["sentence"]
        == "No answer: not one launch was counted (21 launches excluded, 21 planned)."
    )
    assert "none recorded" in analyse([], plan)["answer"]["sentence"]


def test_a_biased_aa_arm_raises_the_alarm(study: Any) -> None:
    plan, records = study
    for record in records:
        if record.get("cell") == "baseline-again":
            for part in record["workloads"].values():
                part["duration_s"] *= 1.3
    assert any(
        "the A/A twin) differed by 23 %" in caveat and "the difference is significant" in caveat
        for caveat in analyse(records, plan)["answer"]["caveats"]
    )


# ------------------------------------------------------------------------------------------------------
# the ceiling

QWEN3_06B = ceiling.ModelShape(1024, 28, 16, 8, 128, 3072, 151_936, 2)


def waves_of(workload: dict[str, Any]) -> list[list[tuple[list[int], int]]]:
    return [
        [(request["prompt_token_ids"], request["max_tokens"]) for request in wave]
        for wave in workload["waves"]
    ]


def test_the_canonical_bound_is_the_published_one() -> None:
    """facts.md: 120.8 M KV tokens x 114,688 B, 1,023 steps x 1.19 GB, 137 TFLOP; 3.68 s, 36,400
    tok/s on an H200.
    """
    work = ceiling.Work.of_waves(waves_of(workloads.build("canonical", "canonical", {})))
    bound = ceiling.bound(work, QWEN3_06B, 4.3e12, 790e12)
    assert work.kv_tokens_read == pytest.approx(120.8e6, rel=1e-3)
    assert (QWEN3_06B.kv_bytes_per_token, bound.decode_steps) == (114_688, 1023)
    assert QWEN3_06B.step_bytes == pytest.approx(1.19e9, rel=5e-3)
    assert bound.prefill_flops == pytest.approx(137e12, rel=5e-3)
    assert bound.seconds == pytest.approx(3.68, abs=0.005)
    assert bound.tokens_per_s == pytest.approx(36_400, rel=1e-3)
    assert bound.decode_limit == "memory"
    assert ceiling.bound(work, QWEN3_06B, 256e9, 60e12).tokens_per_s == pytest.approx(
        2_150, rel=0.03
    )


def test_one_request_by_hand() -> None:
    """facts.md: 1 request of 128 in and 256 out is bound to 0.28 ms a step, 3,600 tok/s."""
    work = ceiling.Work.of_waves([[(list(range(128)), 256)]])
    assert work.kv_tokens_read == sum(range(129, 129 + 255))
    bound = ceiling.bound(work, QWEN3_06B, 4.3e12, 790e12)
    assert bound.decode_s / bound.decode_steps == pytest.approx(0.28e-3, rel=0.03)
    assert bound.tokens_per_s == pytest.approx(3_600, rel=0.03)


def test_a_shared_prefix_is_computed_once() -> None:
    prefix = list(range(100))
    work = ceiling.Work.of_waves([[([*prefix, 200], 2), ([*prefix, 201, 202], 2)], [(prefix, 2)]])
    assert work.distinct_prompt_tokens == 103
    assert work.distinct_prompt_pairs == sum(range(1, 102)) + 101 + 102
    assert work.longest_decode == 2  # two waves, one after the other


REQUEST = st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 5))


@given(waves=st.lists(st.lists(REQUEST, max_size=6), min_size=1, max_size=3))
def test_what_requests_share_is_read_once_a_step(waves: list[list[tuple[list[int], int]]]) -> None:
    """Each prompt position of a wave's prefix tree in as many steps as the longest answer behind it
    takes; so no schedule reads less; one in which all begin at once reads just that much.
    """
    by_hand = in_step = pairs = 0
    for wave in waves:
        steps: dict[tuple[int, ...], int] = {}
        for prompt, n in wave:
            for end in range(1, len(prompt) + 1):
                steps[tuple(prompt[:end])] = max(steps.get(tuple(prompt[:end]), 0), n - 1)
        own = sum(step for _, n in wave for step in range(1, n))
        by_hand += sum(steps.values()) + own
        for step in range(1, max((n for _, n in wave), default=1)):
            running = [(prompt, n) for prompt, n in wave if step < n]
            shared = {
                tuple(prompt[:end]) for prompt, _ in running for end in range(1, len(prompt) + 1)
            }
            in_step += len(shared) + step * len(running)
        pairs += sum(len(prompt) + step for prompt, n in wave for step in range(1, n))
    work = ceiling.Work.of_waves(waves)
    assert work.kv_tokens_read == by_hand == in_step
    assert work.decode_pairs == pairs >= by_hand
    assert work.distinct_prompt_tokens == len(
        {tuple(p[:end]) for wave in waves for p, _ in wave for end in range(1, len(p) + 1)}
    )


def test_a_small_cache_costs_steps_only_for_what_cannot_be_shared() -> None:
    apart = ceiling.Work.of_waves([[([i, *range(50)], 11) for i in range(8)]])
    together = ceiling.Work.of_waves([[([*range(50), i], 11) for i in range(8)]])
    # room for 100 tokens; eight requests hold 51 to 61 each
    cache = 100 * QWEN3_06B.kv_bytes_per_token
    assert ceiling.bound(apart, QWEN3_06B, 1e12, 1e15, cache).decode_steps == math.ceil(
        8 * sum(range(52, 62)) / 100
    )
    assert ceiling.bound(together, QWEN3_06B, 1e12, 1e15, cache).decode_steps == math.ceil(
        (8 * sum(range(2, 12)) + 10 * 50) / 100
    )
    assert ceiling.bound(apart, QWEN3_06B, 1e12, 1e15).decode_steps == 10


def test_few_requests_at_a_time_cost_steps() -> None:
    work = ceiling.Work.of_waves([[([i], 11) for i in range(8)]])
    assert [
        ceiling.bound(work, QWEN3_06B, 1e12, 1e15, max_num_seqs=n).decode_steps for n in (8, 4, 3)
    ] == [10, 20, 27]


def test_ranks_on_a_cpu_share_its_memory_and_have_a_cache_each() -> None:
    plan = make_plan(one_at_a_time(), 2)
    for cell in plan["cells"].values():
        cell["config"]["kv_cache_memory_bytes"] = 4096  # so small that it sets the number of steps
    rows = {row["cell"]: row for row in analyse(make_records(plan, SPEEDUPS), plan)["ceiling"]}
    one, two = rows["baseline"], rows["tensor_parallel_size=2"]
    assert (one["devices"], two["devices"]) == (1, 1)
    assert one["bound"]["decode_steps"] == pytest.approx(2 * two["bound"]["decode_steps"], abs=1)


def test_a_bound_counts_the_gpus_of_every_engine() -> None:
    """The degree of another engine is one of its settings, ours is a level; replicas count as well."""
    plan = make_plan(one_at_a_time(), 2)
    plan["profile"]["device"] = "cuda"
    plan["cells"]["hf"]["config"] |= {"tensor_parallel_size": 2}
    plan["cells"]["tensor_parallel_size=2"]["levels"] |= {"data_parallel_size": 2}
    del plan["cells"]["all"]["levels"]["tensor_parallel_size"]
    # fixed for the whole study
    plan["cells"]["all"]["config"] = {"optimizations": {"tensor_parallel_size": 2}}
    rows = analyse(make_records(plan, SPEEDUPS), plan)["ceiling"]
    devices = {row["cell"]: row["devices"] for row in rows}
    assert [devices[cell] for cell in ("hf", "tensor_parallel_size=2", "all", "baseline")] == [
        2,
        4,
        2,
        1,
    ]


def test_the_bound_refuses_what_it_cannot_use() -> None:
    work = ceiling.Work.of_waves([[([1], 2)]])
    with pytest.raises(ValueError, match="greater than 0"):
        ceiling.bound(work, QWEN3_06B, 0, 1e12)
    with pytest.raises(ValueError, match="lacks hidden_size"):
        ceiling.ModelShape.of_plan({"shape": {}, "dtype": "float32"})


# ------------------------------------------------------------------------------------------------------
# reading records


def write(path: Path, records: list[dict[str, Any]], tail: bytes = b"") -> Path:
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + tail)
    return path


def test_a_truncated_last_line_is_left_out_and_named(tmp_path: Path, study: Any) -> None:
    _, records = study
    file = read_records(write(tmp_path / "records.jsonl", records, b'{"kind": "launch", "sch'))
    assert file.records == records
    assert len(file.notes) == 1
    assert "truncated last line" in file.notes[0]


def test_a_record_glued_to_a_stump_is_saved(tmp_path: Path, study: Any) -> None:
    _, records = study
    path = write(
        tmp_path / "records.jsonl",
        records[:2],
        b'{"kind": "launch", "sch' + json.dumps(records[2]).encode() + b"\n",
    )
    file = read_records(path)
    assert file.records == records[:3]
    assert "begins with a truncated record" in file.notes[0]


def test_a_duplicated_file_is_read_once(tmp_path: Path, study: Any) -> None:
    _, records = study
    file = read_records(write(tmp_path / "records.jsonl", records + records))
    assert file.records == records
    assert f"{len(records)} duplicated lines" in file.notes[0]


def test_a_newer_schema_is_refused_by_name(tmp_path: Path, study: Any) -> None:
    _, records = study
    with pytest.raises(
        RecordError, match=r"line 2: schema 7 is not supported, this program reads 1"
    ):
        read_records(write(tmp_path / "records.jsonl", [records[0], records[1] | {"schema": 7}]))


def test_unknown_kinds_and_damage_are_named(tmp_path: Path, study: Any) -> None:
    _, records = study
    path = tmp_path / "records.jsonl"
    path.write_bytes(
        b"no json\n"
        + json.dumps({"kind": "weather", "schema": 1}).encode()
        + b"\n"
        + json.dumps(records[0]).encode()
        + b"\n"
    )
    file = read_records(path)
    assert file.records == records[:1]
    assert "line 1: not a JSON object" in file.notes[0]
    assert "line 2: unknown kind 'weather'" in file.notes[1]
    with pytest.raises(RecordError, match="no such file"):
        read_records(tmp_path / "absent.jsonl")
