"""The cut of the initial transient: against White's definition, on runs with a known transient, and
what is said where there is no steady state to cut to.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.statistics.steady_state import BATCH, LEAST_BATCHES, common_cut, mser, mser5

VALUES = st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=60)


def error(values: list[float], cut: int) -> float:
    """What White (1997) minimizes, as it is written."""
    rest = values[cut:]
    mean = sum(rest) / len(rest)
    return sum((value - mean) ** 2 for value in rest) / len(rest) ** 2


@settings(max_examples=200, deadline=None)
@given(values=VALUES)
def test_mser_is_what_its_definition_says(values: list[float]) -> None:
    n, found = len(values), mser(np.array(values))
    if n < 2 * LEAST_BATCHES:
        assert found is None
        return

    errors = [error(values, cut) for cut in range(n - LEAST_BATCHES + 1)]
    slack = 1e-9 * (1 + max(errors))  # numpy adds in another order
    best = [cut for cut, each in enumerate(errors) if each <= min(errors) + slack]
    if found is None:
        assert max(best) > n // 2
    else:
        assert found <= n // 2
        assert found in best
    if len(best) == 1:
        assert found == (best[0] if best[0] <= n // 2 else None)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(0, 1000).map(float), min_size=5, max_size=200))
def test_mser_5_is_mser_of_means_of_five(values: list[float]) -> None:
    means = [sum(values[k : k + BATCH]) / BATCH for k in range(0, len(values) - BATCH + 1, BATCH)]
    expected = mser(np.array(means))
    assert mser5(np.array(values)) == (None if expected is None else BATCH * expected)
    rest = len(values) % BATCH
    if rest:  # what fills no batch changes nothing
        assert mser5(np.array(values)) == mser5(np.array(values[:-rest]))


@pytest.mark.parametrize("length", [50, 100, 200])
def test_a_planted_transient_is_cut(length: int) -> None:
    rng = np.random.default_rng(length)
    runs = rng.normal(10, 1, (6, 1000))
    runs[:, :length] -= 8 * np.linspace(1, 0.2, length)
    cut = common_cut(list(runs))
    assert cut is not None
    assert length - BATCH <= cut <= length + 6 * BATCH
    assert abs(float(runs[:, cut:].mean()) - 10) < 0.1 < abs(float(runs.mean()) - 10)


def test_without_a_transient_little_is_cut() -> None:
    rng = np.random.default_rng(3)
    cuts = [common_cut(list(rng.normal(10, 1, (6, 500)))) for _ in range(100)]
    found = [cut for cut in cuts if cut is not None]
    assert len(found) >= 90
    assert float(np.mean(found)) < 75
    assert common_cut([np.full(100, 2.5)] * 3) == 0


def test_what_never_settles_is_too_short() -> None:
    assert common_cut([np.arange(400.0)]) is None
    assert mser5(np.arange(float(BATCH * (2 * LEAST_BATCHES) - 1))) is None
    assert common_cut([]) is None
    settles_late = np.concatenate([np.linspace(0, 50, 350), np.full(50, 50.0)])
    assert common_cut([settles_late]) is None


def test_a_slow_run_does_not_decide_alone() -> None:
    rng = np.random.default_rng(5)
    quick = [rng.normal(1, 0.05, 600) for _ in range(5)]
    for run in quick:
        run[:60] = 0.1
    slow = rng.normal(1000, 50, 600)
    slow[:60] = 100
    cut = common_cut([*quick, slow])
    assert cut is not None
    assert 55 <= cut <= 75
