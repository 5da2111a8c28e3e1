"""Moderated variances: the formula on drawn data, its limits, coverage and false alarms in simulated
studies, and a whole study that asks for them.
"""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from scipy import special, stats

from experiments.study.protocol import Statistics
from experiments.study.spec import load_study
from reports.analysis.analyse import ALL_WORKLOADS, analyse
from reports.page.render import render
from reports.page.table import print_table
from reports.statistics.intervals import Rule, estimate
from reports.statistics.moderated_coverage import SPREADS, Spread, simulate
from reports.statistics.moderation import MIN_EFFECTS, Prior, fit_prior, moderate, prior_of, settle
from tests.support.synthetic import BASE_LEVELS, designed, make_plan, make_records

RULE = Rule(alpha=0.05, smallest_effect=0.05, seed="test")
VARIANCES = st.lists(st.floats(1e-6, 1e3), min_size=MIN_EFFECTS, max_size=25)


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Iterator[None]:
    """statsmodels collects garbage at every Holm adjustment: what other tests left behind need not
    be walked.
    """
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------------------------------------
# the formula


@settings(deadline=None)
@given(VARIANCES, st.integers(1, 39))
def test_the_prior_is_that_of_the_definition(variances: list[float], df: int) -> None:
    """Smyth (2004), section 6.2: the moments of the logs of the variances, solved for d0 and s0^2."""
    d0, s0 = fit_prior(np.array(variances), df)
    e = np.log(np.maximum(variances, 1e-5 * np.median(variances)))
    e = e - special.digamma(df / 2) + math.log(df / 2)
    beyond = float(np.var(e, ddof=1)) - float(special.polygamma(1, df / 2))
    if beyond <= 0:
        assert d0 == math.inf
        assert float(s0) == pytest.approx(math.exp(e.mean()), rel=1e-9)
    else:
        assert float(special.polygamma(1, d0 / 2)) == pytest.approx(beyond, rel=1e-6)
        half = float(d0) / 2
        assert math.log(s0) == pytest.approx(
            e.mean() + float(special.digamma(half)) - math.log(half), abs=1e-9
        )


@given(st.floats(0, 1e3), st.integers(1, 39), st.floats(1e-6, 1e3), st.floats(1e-3, 1e3))
def test_a_moderated_variance_is_the_weighted_mean(
    own: float, df: int, typical: float, d0: float
) -> None:
    found, freedom = moderate(own, df, d0, typical)
    assert float(found) == pytest.approx((d0 * typical + df * own) / (d0 + df), rel=1e-9)
    assert float(freedom) == pytest.approx(d0 + df)


def test_the_limits_are_the_effects_own_variance_and_the_pooled_one() -> None:
    own = np.array([1.0, 4.0, 9.0])
    alone, freedom = moderate(own, 2, 0.0, 5.0)
    assert alone.tolist() == own.tolist()
    assert (freedom == 2).all()
    pooled, freedom = moderate(own, 2, math.inf, 5.0)
    assert pooled.tolist() == [5.0, 5.0, 5.0]
    assert np.isinf(freedom).all()


@given(st.floats(0, 1e3), st.integers(1, 39), st.floats(1e-6, 1e3), st.floats(1e-3, 1e300))
def test_what_is_reported_keeps_the_three_limits(
    own: float, df: int, typical: float, d0: float
) -> None:
    found, freedom = settle(own, df, d0, typical)
    assert found >= own
    assert df <= freedom <= 1.5 * df
    assert found <= max(own, typical) * (1 + 1e-9)


def test_a_drawn_prior_is_found_again() -> None:
    rng = np.random.default_rng(0)
    true = 0.04 * 6 / rng.chisquare(6, (200, 400))
    d0, s0 = fit_prior(true * rng.chisquare(2, true.shape) / 2, 2)
    assert float(np.median(d0)) == pytest.approx(6, rel=0.15)
    assert float(np.median(s0)) == pytest.approx(0.04, rel=0.05)


def test_few_effects_or_none_that_vary_have_no_prior() -> None:
    assert prior_of([0.1] * (MIN_EFFECTS - 1), [2] * (MIN_EFFECTS - 1)) is None
    assert prior_of([0.0] * 12, [2] * 12) is None
    found = prior_of([0.0, *[0.1] * 11], [2] * 12)
    assert found is not None
    assert found.variance == pytest.approx(0.1 * 11 / 12)


def test_an_effect_by_hand() -> None:
    """Three blocks, a noisier machine than this effect's own blocks show: d0 counts one, s~^2 is a
    third of the way to the typical variance.
    """
    samples = {0: 0.9, 1: 1.0, 2: 1.1}
    effect = estimate(samples, RULE, "x", Prior(math.inf, 0.07, 16))
    variance = (1 * 0.07 + 2 * 0.01) / 3
    half = float(stats.t.ppf(0.975, 3)) * math.sqrt(variance / 3)
    assert effect["df"] == 3
    assert effect["sd_used"] == pytest.approx(math.sqrt(variance))
    assert (effect["low"], effect["high"]) == pytest.approx(
        (math.exp(1 - half), math.exp(1 + half))
    )
    assert effect["p"] == pytest.approx(2 * stats.t.sf(1 / math.sqrt(variance / 3), 3))
    plain = estimate(samples, RULE, "x")
    assert plain["sd_log"] == effect["sd_log"] == pytest.approx(0.1)
    assert "df" not in plain


# ------------------------------------------------------------------------------------------------
# simulated studies


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_intervals_cover_and_families_raise_few_false_alarms(spread: Spread, blocks: int) -> None:
    """Whatever the cells' noise: 93 % over all effects, 91 % for the one that is covered least."""
    found = simulate(spread, 17, blocks, seed=1)
    assert found.mean >= 0.93
    assert found.least >= 0.91
    assert found.false_alarm <= 0.05


def test_the_method_of_the_paper_as_it_is_would_not_do() -> None:
    """Why d0 is bounded, and no effect is less noisy than it looks."""
    assert simulate("one", 20, 3, "Smyth").least < 0.8
    assert simulate("half", 20, 3, "Smyth").false_alarm > 0.1


# ------------------------------------------------------------------------------------------------
# whole studies

ON = ["prefix_cache", "batching", "tensor_parallel_size", "overlap", "kernels"]
TRUTH = {"batching": 6.0, "tensor_parallel_size": 0.8, "kernels": 1.5}


def study(
    blocks: int, workloads: tuple[str, ...] = ("scaled",), seed: int = 0, **asked: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    factors = {factor: {"baseline": BASE_LEVELS.get(factor, "off")} for factor in ON}
    plan = make_plan(
        designed("both", ON), blocks, workloads, seed, statistics=asked, factors=factors
    )
    return plan, make_records(plan, TRUTH, seed, 0.1)


def of(analysis: dict[str, Any], cell: str, workload: str = "scaled") -> dict[str, Any]:
    (found,) = (
        effect
        for effect in analysis["effects"]
        if (effect["cell"], effect["workload"]) == (cell, workload)
        and effect["metric"] == "output_tokens_per_s"
    )
    return found


def test_a_study_with_two_blocks_says_more_with_moderated_variances(tmp_path: Path) -> None:
    plan, records = study(2, variance="moderated", families="by_question")
    plain, _ = study(2)
    own, pooled = analyse(records, {**plan, "study": plain["study"]}), analyse(records, plan)
    assert (of(own, "all")["verdict"], of(pooled, "all")["verdict"]) == ("inconclusive", "faster")
    widths = [
        np.median([math.log(e["high"] / e["low"]) for e in analysis["effects"] if e["low"]])
        for analysis in (own, pooled)
    ]
    assert widths[1] < 0.8 * widths[0]
    assert all(1 < effect["df"] <= 1.5 for effect in pooled["effects"])
    assert [effect["ratio"] for effect in own["effects"]] == [
        effect["ratio"] for effect in pooled["effects"]
    ]
    assert [effect["sd_log"] for effect in own["effects"]] == [
        effect["sd_log"] for effect in pooled["effects"]
    ]

    markdown, html = render(plan, records, pooled, tmp_path)
    page = markdown.read_text(encoding="utf-8")
    assert "The variance of each effect is moderated (Smyth 2004)" in page
    assert "The moderated variance" in page
    assert "d0, estimated" in page
    assert "d0, used" in html.read_text(encoding="utf-8")
    assert "one switch alone; everything on" in page
    assert "variance: moderated by all effects" in printed(pooled, verbose=True)
    assert "variance:" not in printed(pooled)
    assert "variance: each effect's own, 1 degree of freedom" in printed(own, verbose=True)


def printed(analysis: dict[str, Any], verbose: bool = False) -> str:
    out = io.StringIO()
    print_table(analysis, Console(file=out, width=200), verbose=verbose)
    return out.getvalue()


def test_each_question_has_a_family_of_its_own() -> None:
    plan, records = study(4, ("scaled", "shared"), variance="moderated", families="by_question")
    split = analyse(records, plan)
    joint = analyse(
        records, {**plan, "study": {**plan["study"], "statistics": {"variance": "moderated"}}}
    )
    assert of(split, "all", ALL_WORKLOADS)["p_holm"] == of(split, "all", ALL_WORKLOADS)["p"]
    assert of(joint, "all", ALL_WORKLOADS)["p_holm"] > of(joint, "all", ALL_WORKLOADS)["p"]
    alone = [
        of(split, name, work)
        for name in split["cells"]
        for work in ("scaled", "shared")
        if "=" in name
    ]
    smallest = min(alone, key=lambda effect: effect["p"])
    assert len(alone) == 2 * len(ON)
    assert smallest["p_holm"] == pytest.approx(min(1, len(alone) * smallest["p"]))


def test_what_is_left_out_is_judged_by_ratios_to_everything_on() -> None:
    plan, records = study(3, variance="moderated")
    analysis = analyse(records, plan)
    shared = {
        (prior["workload"], prior["shared"]): prior
        for prior in analysis["statistics"]["priors"]
        if prior["metric"] == "output_tokens_per_s"
    }
    assert {cell for _, cell in shared} == {"baseline", "all"}
    for row in analysis["factors"]:
        prior = shared[row["workload"], "all" if row["kind"] == "left out" else "baseline"]
        d0 = min(1.0, math.inf if prior["d0"] is None else prior["d0"])
        mixed = (d0 * prior["sd"] ** 2 + 2 * row["sd_log"] ** 2) / (d0 + 2)
        assert row["sd_used"] == pytest.approx(math.sqrt(max(mixed, row["sd_log"] ** 2)))


def test_a_small_study_that_asks_keeps_each_effects_own_variance(tmp_path: Path) -> None:
    plan = make_plan(designed("one_at_a_time", ON[:3]), 3, statistics={"variance": "moderated"})
    records = make_records(plan, TRUTH)
    analysis = analyse(records, plan)
    assert not analysis["statistics"]["priors"]
    assert all("df" not in effect for effect in analysis["effects"])
    page = render(plan, records, analysis, tmp_path)[0].read_text(encoding="utf-8")
    assert "each effect is judged by its own variance" in page


def test_studies_say_what_they_want() -> None:
    assert load_study("gpu-ablate")[0].statistics == Statistics(
        variance="moderated", families="by_question"
    )
    assert load_study("embedded")[0].statistics == Statistics()
    with pytest.raises(ValidationError, match="variance"):
        Statistics(variance="pooled")  # type: ignore[arg-type]
