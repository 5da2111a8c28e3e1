"""Any alpha that a study may have gives a report: at a tiny one the interval reaches to infinity,
and is shown so.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports import text
from reports.analysis.analyse import analyse
from reports.page.render import render
from reports.statistics.intervals import Rule, estimate, judge
from tests.support.synthetic import factorial, make_plan, make_records, one_at_a_time


def test_an_interval_that_a_float_cannot_hold_is_infinite() -> None:
    effect = estimate({0: 0.15, 1: -0.15}, Rule(alpha=1e-4), "x")
    judge([effect], Rule(alpha=1e-4))
    assert (effect["low"], effect["high"], effect["verdict"]) == (0.0, math.inf, "inconclusive")
    assert text.interval(effect["low"], effect["high"]) == "0.000 to ∞"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=8),
    st.floats(1e-300, 1, exclude_max=True) | st.sampled_from((5e-324, 1e-16, 1e-4, 0.999999)),
)
def test_every_alpha_and_every_sample_has_an_estimate(
    log_ratios: list[float], alpha: float
) -> None:
    rule = Rule(alpha=alpha)
    with np.errstate(all="raise", under="ignore"):
        effect = estimate(dict(enumerate(log_ratios)), rule, "x")
    judge([effect], rule)
    if effect["n"] > 1:
        assert effect["low"] <= effect["ratio"] * (1 + 1e-9)
        assert effect["ratio"] <= effect["high"] * (1 + 1e-9)
        assert effect["detectable"] >= 0
    assert text.interval(effect["low"], effect["high"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cells", [one_at_a_time, factorial])
@pytest.mark.parametrize("alpha", [1e-4, 1e-30])
def test_a_study_with_a_tiny_alpha_has_its_report(
    cells: object, alpha: float, tmp_path: Path
) -> None:
    plan = make_plan(cells(), blocks=2, alpha=alpha)  # type: ignore[operator]
    records = make_records(plan, {"batching": 2.0}, sd=0.2)
    markdown, _ = render(plan, records, analyse(records, plan), tmp_path)
    assert "∞" in markdown.read_text(encoding="utf-8")
