"""The statistics against studies whose truth is planted, 2,000 at a time: intervals cover, false
alarms are rare.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from experiments.study import designs
from experiments.study.block_count import MAX_BLOCKS, MIN_BLOCKS
from reports.statistics import coverage
from reports.statistics.contrasts import Contrast, Lattice
from reports.statistics.coverage import STUDIES, Noise, log_ratios, t_coverage
from reports.statistics.intervals import Rule, estimate, holm, t_interval, t_test, verdict
from reports.statistics.linear_model import fit
from tests.support.synthetic import designed, factorial

ALLOWED_BLOCKS = range(MIN_BLOCKS, MAX_BLOCKS + 1)
"""Every number of blocks that experiments/study/spec.py lets a study have."""
RULE = Rule(alpha=0.05, smallest_effect=0.05, seed="test")
PAGE = Path(__file__).parents[2] / "docs" / "methodology.md"


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("blocks", ALLOWED_BLOCKS)
def test_intervals_cover_the_planted_ratio(kind: Noise, blocks: int) -> None:
    assert 0.93 <= t_coverage(kind, blocks) <= 0.97


@pytest.mark.parametrize("blocks", ALLOWED_BLOCKS)
def test_skew_that_both_sides_share_does_no_harm(blocks: int) -> None:
    assert t_coverage("skewed", blocks) >= 0.93


def test_the_methodology_page_prints_what_the_simulation_finds() -> None:
    """The weak spot too: skew in the treatment alone. Refresh it with the command that the page
    names.
    """
    assert coverage.put_into(PAGE.read_text()) == PAGE.read_text()
    with pytest.raises(ValueError, match="no place for the table"):
        coverage.put_into("# A page")


def test_a_percentile_bootstrap_would_not_do() -> None:
    """Why Student's t comes first: at six blocks the percentile bootstrap covers far less than 95
    %.
    """
    assert 0.75 <= coverage.bootstrap_coverage("normal", 6, "percentile") <= 0.91


# -------------------------------------------------------------------------------------------------
# false alarms, power


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_the_aa_arm_is_called_different_in_at_most_one_study_of_twenty(kind: Noise) -> None:
    called = [
        called_different(log_ratios(kind, blocks, ratio=1.0, seed=1)) for blocks in ALLOWED_BLOCKS
    ]
    assert np.mean(called) <= 0.05
    # one number of blocks alone: three standard errors of 2,000 studies on top
    assert max(called) <= 0.065


def test_the_aa_arm_at_a_noise_that_no_band_hides() -> None:
    """sd 0.2: nothing is equivalent, so the test alone decides, and errs as often as it says."""
    assert (
        0.04
        <= np.mean(
            [
                called_different(log_ratios("normal", n, ratio=1.0, sd=0.2, seed=1))
                for n in (3, 6, 12)
            ]
        )
        <= 0.06
    )


def called_different(samples: NDArray[np.float64]) -> float:
    """The share of studies whose one effect is called faster or slower."""
    low, high = np.exp(t_interval(samples, RULE.alpha))
    verdicts = [verdict(*numbers, RULE) for numbers in zip(low, high, t_test(samples), strict=True)]
    return float(np.mean([found in ("faster", "slower") for found in verdicts]))


def test_holm_bounds_the_error_of_a_whole_family() -> None:
    # [studies, effects, blocks]
    samples = np.stack([log_ratios("normal", 4, 1.0, 0.2, seed) for seed in range(6)], axis=1)
    p_values = t_test(samples)
    # without it, a false alarm in every fourth study
    assert (p_values.min(axis=1) < 0.05).mean() > 0.2
    for row in p_values[:10]:
        assert min(holm(list(row))) == pytest.approx(min(1, 6 * row.min()))
    assert (6 * p_values.min(axis=1) < 0.05).mean() <= 0.06


@pytest.mark.parametrize("effects", [0, 1, 2, 7, 40])
def test_holm_is_that_of_statsmodels(effects: int) -> None:
    rng = np.random.default_rng(effects)
    p_values = rng.choice([0.0, 1e-300, 0.004, 0.02, 1.0, *rng.random(5)], effects)  # with ties
    expected = multipletests(p_values, method="holm")[1].tolist() if effects > 1 else list(p_values)
    assert holm(list(p_values)) == expected


@pytest.mark.parametrize("blocks", [2, 3, 6, 12, 40])
def test_detectable_is_the_effect_found_with_the_stated_power(blocks: int) -> None:
    samples = log_ratios("normal", blocks, 1.0, 0.03)
    truth_sd = 0.03 * math.sqrt(2)
    detectable = estimate(dict(enumerate(stats.norm.ppf(np.linspace(0.1, 0.9, blocks)))), RULE, "x")
    shift = math.log1p(detectable["detectable"]) / detectable["sd_log"] * truth_sd
    assert 0.77 <= float((t_test(samples + shift) < 0.05).mean()) <= 0.83


# -------------------------------------------------------------------------------------------------
# whole designs

ON = ["prefix_cache", "batching", "tensor_parallel_size"]
MAIN = {"prefix_cache": 0.1, "batching": 0.9, "tensor_parallel_size": -0.3}
PAIR = frozenset({"batching", "prefix_cache"})


def log_rates(
    kind: Noise, lattice: Lattice, blocks: int, pair: float, sd: float = 0.03
) -> dict[str, NDArray[np.float64]]:
    """{cell: [studies, blocks]} log rates of a factorial with planted main effects and one planted
    interaction.
    """
    rng = np.random.default_rng([7, blocks, len(lattice.cell)])
    block = rng.normal(0, 0.2, (STUDIES, blocks))
    names = {point: {factor for factor, _ in point} for point in lattice.cell}
    return {
        cell: block
        - coverage.noise(rng, kind, (STUDIES, blocks), sd)
        + sum(MAIN.get(factor, 0.0) for factor in names[point])
        + pair * (names[point] >= PAIR)
        for point, cell in lattice.cell.items()
    }


def evaluated(contrast: Contrast, values: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.sum([weight * values[cell] for cell, weight in contrast.items()], axis=0)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("blocks", [2, 3, 4, 6, 8, 12, 24, 40])
def test_intervals_of_every_contrast_cover(kind: Noise, blocks: int) -> None:
    lattice = Lattice(factorial())
    values = log_rates(kind, lattice, blocks, pair=0.2)
    contrasts = [c for found in lattice.factor_contrasts().values() for c in found.values()] + list(
        lattice.interactions().values()
    )
    assert len(contrasts) == 4 * 3 + 3
    truths = log_rates(kind, lattice, 1, pair=0.2, sd=0.0)
    for contrast in contrasts:
        truth = float(evaluated(contrast, truths)[0, 0])
        low, high = t_interval(evaluated(contrast, values), 0.05)
        assert 0.93 <= float(((low <= truth) & (truth <= high)).mean()) <= 0.97


@pytest.mark.parametrize("blocks", [3, 6, 12])
def test_planted_interactions_are_found_and_absent_ones_are_not(blocks: int) -> None:
    lattice = Lattice(factorial())
    values = log_rates("normal", lattice, blocks, pair=0.3)
    p_values = np.stack(
        [t_test(evaluated(contrast, values)) for contrast in lattice.interactions().values()],
        axis=1,
    )
    planted = [
        frozenset(factor for factor, _ in pair) == PAIR for pair in lattice.interactions()
    ].index(True)
    # Holm takes the smallest of the three p-values times 3, the next one times 2
    first = p_values.argmin(axis=1) == planted
    assert (first & (3 * p_values[:, planted] < 0.05)).mean() >= 0.9
    absent = np.delete(p_values, planted, axis=1).min(axis=1)
    assert (np.where(first, 2, 3) * absent < 0.05).mean() <= 0.065  # 5 % and three standard errors


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("blocks", [2, 6])
def test_intervals_of_the_linear_model_of_a_fraction_cover(kind: Noise, blocks: int) -> None:
    factors = [*ON, "overlap"]
    generators = designs.choose_generators(factors, 4)
    lattice = Lattice(designed("fractional_factorial", factors, generators), generators=generators)
    runs, truth = lattice.factorial_cells(), dict(MAIN, overlap=0.0)
    values = log_rates(kind, lattice, blocks, pair=0.0)
    covered = []
    for study in range(300):
        rows = fit(
            {cell: dict(enumerate(values[cell][study])) for cell in runs},
            runs,
            factors,
            generators,
            RULE,
        )
        covered += [
            row["low"] <= math.exp(truth.get(row["terms"][0], 0.0)) <= row["high"] for row in rows
        ]
    assert len(covered) == 300 * 7
    assert 0.93 <= np.mean(covered) <= 0.97


def test_every_place_that_the_methodology_page_names_exists() -> None:
    """Twelve rules, each with the files that keep it."""
    page = PAGE.read_text()
    rules = [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rules] == list(range(1, 13))
    named = {
        line: re.findall(r"`([\w./-]+\.(?:py|yaml|md))`", line.split("|")[3]) for line in rules
    }
    assert all(named.values()), "a rule without a place"
    everywhere = set(
        re.findall(r"`((?:experiments|reports|tests|docs|ablations)/[\w./-]+)`", page)
    ) | set().union(*named.values())
    missing = [path for path in sorted(everywhere) if not (PAGE.parents[1] / path).exists()]
    assert not missing
