"""The statistics of a report on drawn data: each figure equals its plain definition, written out
here again, or what SciPy and statsmodels compute.

Adjustment of p-values, intervals, tests, power, verdicts, contrasts, the linear model, residuals
and the figures of a launch. Smyth's moderation itself has its properties in
tests/reports/test_moderation.py.
"""

from __future__ import annotations

import math
import statistics
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestPower

from experiments.study import designs
from experiments.study.block_count import detectable_in_sd
from property_tests.support.profiles import holds
from reports import text
from reports.analysis.analyse import analyse
from reports.statistics.contrasts import Contrast, Lattice, Point, evaluate
from reports.statistics.intervals import (
    Rule,
    bootstrap_interval,
    estimate,
    holm,
    judge,
    leaning,
    t_interval,
    t_test,
    verdict,
)
from reports.statistics.linear_model import fit
from reports.statistics.metrics import PERCENTILES, harmonic_mean, of_launch
from reports.statistics.moderation import Prior
from reports.statistics.residuals import diagnose
from tests.support.synthetic import designed, factorial, make_plan, make_records, one_at_a_time

# Around the usual levels, where Holm, Hochberg and Bonferroni differ.
P_VALUES = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.01, 0.0125, 0.04, 0.045, 0.05])), max_size=12
)
SAMPLES = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=40)
ALPHAS = st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.32])
SEEDS = st.integers(0, 2**32 - 1)


# adjustment, intervals, tests


def step_down(p_values: list[float]) -> list[float]:
    """Holm's adjustment by its definition (tests/reports compares `holm` with statsmodels, whose
    own takes a fifth of a second a call).
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


@holds(fast=200, p_values=P_VALUES)
def test_adjusted_p_values_are_holms(p_values: list[float]) -> None:
    """Step down: the k-th smallest p-value (from 0) counts n - k times, and none less than one
    before it.
    """
    assert holm(p_values) == pytest.approx(step_down(p_values), abs=1e-15)


@holds(fast=200, samples=SAMPLES, alpha=ALPHAS)
def test_interval_and_test_are_those_of_scipy(samples: list[float], alpha: float) -> None:
    values = np.array(samples)
    low, high = t_interval(values, alpha)
    if np.ptp(values) < 1e-6:
        assert low == pytest.approx(values[0]) == pytest.approx(float(high))
        return
    expected = stats.ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(1 - alpha)
    assert (float(low), float(high)) == pytest.approx(
        (interval.low, interval.high), rel=1e-9, abs=1e-12
    )
    assert float(t_test(values)) == pytest.approx(expected.pvalue, rel=1e-9)


@holds(fast=100, samples=SAMPLES, alpha=ALPHAS, power=st.sampled_from([0.5, 0.8, 0.95]))
def test_an_estimate_is_the_geometric_mean_with_its_interval(
    samples: list[float], alpha: float, power: float
) -> None:
    values, n = np.array(samples[:5]), len(samples[:5])  # below the blocks of a bootstrap
    # the blocks have numbers of their own, in any order
    found = estimate(
        dict(reversed([(2 * i + 3, v) for i, v in enumerate(samples[:5])])),
        Rule(alpha=alpha, power=power),
        "x",
    )
    assert found["n"] == n
    assert found["ratio"] == pytest.approx(stats.gmean(np.exp(values)))
    assert list(found["by_block"].values()) == pytest.approx(list(np.exp(values)))
    low, high = t_interval(values, alpha)
    assert (found["low"], found["high"]) == pytest.approx((math.exp(low), math.exp(high)))
    assert found["sd_log"] == pytest.approx(statistics.stdev(samples[:5]), abs=1e-12)
    assert found["p"] == pytest.approx(float(t_test(values)), rel=1e-9)
    assert found["boot_low"] is found["boot_high"] is None
    log_ratio = detectable_in_sd(n, alpha, power) * values.std(ddof=1)
    assert found["detectable"] == pytest.approx(
        math.expm1(log_ratio) if log_ratio < 700 else math.inf
    )


@holds(
    fast=60,
    n=st.integers(2, 40),
    alpha=st.sampled_from([0.01, 0.05, 0.1]),
    power=st.sampled_from([0.5, 0.8, 0.9]),
    df=st.one_of(st.none(), st.floats(1.5, 60)),
)
def test_what_is_detectable_has_the_power(
    n: int, alpha: float, power: float, df: float | None
) -> None:
    mean = detectable_in_sd(n, alpha, power, df)
    # the upper tail of the two-sided test
    found = TTestPower().power(mean, n, alpha / 2, df=df, alternative="larger")
    assert found == pytest.approx(power, abs=1e-4)


@holds(
    fast=100,
    samples=SAMPLES,
    alpha=ALPHAS,
    prior=st.builds(
        Prior, st.one_of(st.floats(0.1, 80), st.just(math.inf)), st.floats(1e-4, 1), st.just(9)
    ),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_a_moderated_estimate_follows_the_methodology(
    samples: list[float], alpha: float, prior: Prior, scale: float
) -> None:
    """(d0 s0^2 + d s^2) / (d0 + d) with d0 at most d / 2, and never below s^2."""
    values = samples[:5]
    n, mean, own = len(values), statistics.fmean(values), statistics.variance(values)
    d, d0 = n - 1, min(prior.df, (n - 1) / 2)
    variance = max(own, (d0 * scale * prior.variance + d * own) / (d0 + d))
    found = estimate(dict(enumerate(values)), Rule(alpha=alpha), "x", prior, scale)
    assert found["df"] == pytest.approx(d0 + d)
    assert found["sd_used"] == pytest.approx(math.sqrt(variance))
    expected = stats.t(d0 + d, loc=mean, scale=math.sqrt(variance / n))
    log_low, log_high = expected.interval(1 - alpha)
    assert found["low"] == pytest.approx(math.exp(log_low), rel=1e-6)
    if log_high < 700:
        assert found["high"] == pytest.approx(math.exp(log_high), rel=1e-6)
    # as likely on either side
    assert found["p"] == pytest.approx(
        2 * min(expected.cdf(0.0), expected.sf(0.0)), rel=1e-6, abs=1e-12
    )


@holds(
    fast=8,
    factor=10,
    seed=SEEDS,
    n=st.integers(6, 20),
    skewed=st.booleans(),
    alpha=st.sampled_from([0.05, 0.1]),
)
def test_the_bootstrap_interval_is_efrons(seed: int, n: int, skewed: bool, alpha: float) -> None:
    """BCa written out (Efron 1987), with resamples of its own: equal but for their number."""
    rng = np.random.default_rng(seed)
    samples = rng.exponential(size=n) if skewed else rng.normal(size=n)
    found = bootstrap_interval(samples, alpha, str(seed))
    means = rng.choice(samples, (20_000, n)).mean(axis=1)
    bias = stats.norm.ppf((means < samples.mean()).mean())
    left_out = np.array([np.delete(samples, i).mean() for i in range(n)])
    apart = left_out.mean() - left_out
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    expected = []
    for z in stats.norm.ppf([alpha / 2, 1 - alpha / 2]):
        level = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        expected.append(float(np.quantile(means, level)))
    error = samples.std(ddof=1) / math.sqrt(n)
    assert found == pytest.approx(tuple(expected), abs=(0.5 if skewed else 0.2) * error)


# verdicts


EDGES = st.sampled_from([0.5, 0.9, 1 / 1.05, 0.96, 0.999, 1.0, 1.001, 1.04, 1.05, 1.2, 2.0])


@holds(
    fast=300,
    bounds=st.one_of(
        st.none(),
        st.tuples(st.one_of(EDGES, st.floats(0.1, 10)), st.one_of(EDGES, st.floats(0.1, 10))),
    ),
    p=st.one_of(st.none(), st.sampled_from([0.0, 0.049, 0.05, 0.051, 1.0]), st.floats(0, 1)),
    alpha=st.sampled_from([0.01, 0.05]),
    better=st.sampled_from(["higher", "lower"]),
)
def test_a_verdict_follows_the_rule_of_the_methodology(
    bounds: tuple[float, float] | None, p: float | None, alpha: float, better: Any
) -> None:
    low, high = sorted(bounds) if bounds else (None, None)
    found = verdict(low, high, p, Rule(alpha=alpha, smallest_effect=0.05), better)
    if low is None or high is None or p is None:
        assert found == "inconclusive"
    elif low > 1 / 1.05 and high < 1.05:
        assert found == "equivalent"
    elif p < alpha:
        gain = low > 1 if better == "higher" else low <= 1
        assert found == ("faster" if gain else "slower")
    else:
        assert found == "inconclusive"
    leans = leaning(low, high, better)
    shown = text.verdict({"verdict": found, "leans": leans})
    leaves_out_one = low is not None and high is not None and not low <= 1 <= high
    assert (leans is not None) == leaves_out_one
    assert shown == (f"suggestive: {leans}" if found == "inconclusive" and leans else found)
    if found in ("faster", "slower") and leans:
        assert leans == found


@holds(
    fast=60,
    families=st.lists(st.lists(st.floats(-0.2, 0.2), max_size=5), min_size=1, max_size=7),
    better=st.sampled_from(["higher", "lower"]),
)
def test_a_family_is_judged_together(families: list[list[float]], better: Any) -> None:
    """Only effects with a p-value are tests; each verdict is that of its adjusted p-value, in the
    direction of the metric.
    """
    rule = Rule()
    family = [estimate(dict(enumerate(values)), rule, "x") for values in families]
    judge(family, rule, better)
    tested = [effect for effect in family if effect["n"] > 1]
    p_values = [effect["p"] for effect in tested]
    assert [effect["p_holm"] for effect in tested] == pytest.approx(step_down(p_values))
    for effect in family:
        if effect["n"] < 2:
            assert (effect["p_holm"], effect["verdict"]) == (None, "inconclusive")
        elif effect["verdict"] in ("faster", "slower"):
            assert effect["p_holm"] is not None
            assert effect["ratio"] is not None
            assert effect["p_holm"] < rule.alpha
            grew = effect["ratio"] > 1
            assert (effect["verdict"] == "faster") == (grew == (better == "higher"))


@holds(
    fast=4,
    factor=10,
    seed=st.integers(0, 10_000),
    design=st.sampled_from([one_at_a_time, factorial]),
    blocks=st.integers(2, 5),
    sd=st.sampled_from([0.01, 0.1]),
)
def test_every_p_value_of_a_report_is_adjusted_within_its_family(
    seed: int, design: Any, blocks: int, sd: float
) -> None:
    """Treatments of all workloads of one metric; the A/A twin; each kind of factor effect;
    interactions; references; the linear model.
    """
    plan = make_plan(design(), blocks, ("scaled", "shared"), seed)
    analysis = analyse(make_records(plan, {"batching": 1.1, "hf": 0.8}, seed, sd), plan)
    families: dict[Any, list[Any]] = {}
    for effect in analysis["effects"]:
        together = effect["role"] != "aa" and effect["workload"] not in analysis["workloads"]
        families.setdefault((effect["metric"], effect["role"] == "aa", together), []).append(effect)
    for row in analysis["factors"]:
        families.setdefault(("factors", row["kind"]), []).append(row)
    families["interactions"] = analysis["interactions"]
    families["references"] = analysis["references"]
    families["linear model"] = analysis["linear_model"]
    for family in families.values():
        tested = [effect for effect in family if effect["p"] is not None]
        p_values = [effect["p"] for effect in tested]
        assert [effect["p_holm"] for effect in tested] == pytest.approx(step_down(p_values))


# contrasts

OFF = {"a": "off", "b": "off", "c": 1}
LEVELS: dict[str, list[Any]] = {"a": ["on"], "b": ["on", "more"], "c": [2]}


@st.composite
def lattices(draw: st.DrawFn) -> tuple[dict[str, Any], Point]:
    """Cells of the baseline, everything on, and some of the points between; a factor has one level
    or two beside off.
    """
    two = draw(st.booleans())
    levels = {factor: found[: 2 if two else 1] for factor, found in LEVELS.items()}
    factors = draw(st.sampled_from([["a", "b"], ["a", "b", "c"]]))
    off = {factor: OFF[factor] for factor in factors}
    points = [
        dict(zip(factors, chosen, strict=True))
        for chosen in product(*([off[factor], *levels[factor]] for factor in factors))
    ]
    everything = {factor: levels[factor][0] for factor in factors}
    whole = draw(st.booleans())
    cells = {
        str(number): {
            "role": "baseline" if point == off else "all" if point == everything else "treatment",
            "engine": "nanovllm",
            "levels": point,
        }
        for number, point in enumerate(points)
        if whole or point in (off, everything) or draw(st.booleans())
    }
    cells["twin"] = {"role": "aa", "engine": "nanovllm", "levels": off}
    cells["other"] = {"role": "reference", "engine": "hf", "levels": everything}
    return cells, frozenset(everything.items())


@holds(fast=150, lattice=lattices(), seed=SEEDS)
def test_contrasts_are_what_their_names_say(
    lattice: tuple[dict[str, Any], Point], seed: int
) -> None:
    """Alone, left out, average, Shapley (the mean over all orders of switching on) and interaction,
    from the values of the points, wherever those points were visited; and nowhere else.
    """
    cells, everything = lattice
    found = Lattice(cells)
    rng = np.random.default_rng(seed)
    logs = {name: {0: float(rng.normal()), 7: float(rng.normal())} for name in cells}
    at = {
        frozenset(pair for pair in cell["levels"].items() if OFF[pair[0]] != pair[1]): logs[name][7]
        for name, cell in cells.items()
        if cell["role"] not in ("aa", "reference")
    }
    toggles = sorted({toggle for point in at for toggle in point}, key=str)

    def value(contrast: Contrast) -> float:
        return evaluate(contrast, logs)[7]

    def without(point: Point, *factors: str) -> bool:
        return not {factor for factor, _ in point} & set(factors)

    expected: dict[str, dict[Any, float]] = {"alone": {}, "average": {}, "Shapley": {}}
    levels: dict[str, int] = {}
    for factor, _ in toggles:
        levels[factor] = levels.get(factor, 1) + 1
    full = len(at) == math.prod(levels.values())
    for toggle in toggles:
        steps = [
            at[point | {toggle}] - at[point]
            for point in at
            if without(point, toggle[0]) and point | {toggle} in at
        ]
        if frozenset({toggle}) in at:
            expected["alone"][toggle] = at[frozenset({toggle})] - at[frozenset()]
        if full and len(steps) > 1:
            expected["average"][toggle] = statistics.fmean(steps)
    subsets = [frozenset(s) for n in range(4) for s in combinations(everything, n)]
    if all(subset in at for subset in subsets):
        orders = list(permutations(everything))
        for toggle in everything:
            gains = []
            for order in orders:
                before = frozenset(order[: order.index(toggle)])
                gains.append(at[before | {toggle}] - at[before])
            expected["Shapley"][toggle] = statistics.fmean(gains)
    contrasts = found.factor_contrasts()
    for kind, values in expected.items():
        assert {t: value(c) for t, c in contrasts[kind].items()} == pytest.approx(values)
    left_out = {toggle: value(contrast) for toggle, contrast in contrasts["left out"].items()}
    for toggle in everything:
        if everything - {toggle} in at:
            assert left_out[toggle] == pytest.approx(at[everything] - at[everything - {toggle}])
    if contrasts["Shapley"]:  # the shares add up to what everything on brings
        shares = [value(contrast) for contrast in contrasts["Shapley"].values()]
        assert sum(shares) == pytest.approx(at[everything] - at[frozenset()])

    pairs = {}
    for one, two in combinations(toggles, 2):
        changes = [
            at[point | {one, two}] - at[point | {one}] - at[point | {two}] + at[point]
            for point in at
            if without(point, one[0], two[0])
            and all(point | extra in at for extra in ({one}, {two}, {one, two}))
        ]
        if one[0] != two[0] and changes:
            pairs[one, two] = statistics.fmean(changes)
    assert {pair: value(c) for pair, c in found.interactions().items()} == pytest.approx(pairs)


@st.composite
def two_level_designs(draw: st.DrawFn) -> tuple[list[str], designs.Generators, dict[str, Any]]:
    """A full factorial of two or three factors, or half a factorial of four or five."""
    k = draw(st.integers(2, 5))
    factors = ["kernels", "overlap", "prefix_cache", "batching", "tensor_parallel_size"][:k]
    if k < 4:
        return factors, {}, designed("full_factorial", factors)
    generators = designs.choose_generators(factors, 4)
    return factors, generators, designed("fractional_factorial", factors, generators)


@holds(fast=25, design=two_level_designs(), blocks=st.integers(2, 6), seed=SEEDS, alpha=ALPHAS)
def test_a_factorial_is_analysed_as_the_textbook_says(
    design: Any, blocks: int, seed: int, alpha: float
) -> None:
    """Main effect: mean of the cells with the factor minus mean of those without. Interaction: the
    difference of two such effects. The linear model of a complete design estimates the same, with
    the residual of a two-way table of cells and blocks.
    """
    factors, generators, cells = design
    lattice = Lattice(cells, generators=generators)
    runs = lattice.factorial_cells()
    rng = np.random.default_rng(seed)
    logs = {name: {b: float(rng.normal()) for b in range(blocks)} for name in cells}
    mean = {name: statistics.fmean(logs[name].values()) for name in runs}

    def effect(names: list[str], inside: list[str]) -> float:
        first, *rest = names
        with_it = [name for name in inside if first in runs[name]]
        without = [name for name in inside if first not in runs[name]]
        if rest:
            return effect(rest, with_it) - effect(rest, without)
        return statistics.fmean(mean[n] for n in with_it) - statistics.fmean(
            mean[n] for n in without
        )

    def value(contrast: Contrast) -> float:
        return statistics.fmean(evaluate(contrast, logs).values())

    contrasts, pairs = lattice.factor_contrasts()["average"], lattice.interactions()
    assert {factor for factor, _ in contrasts} == set(factors)
    for (factor, _), contrast in contrasts.items():
        assert value(contrast) == pytest.approx(effect([factor], list(runs)))
    for (one, two), contrast in pairs.items():
        assert value(contrast) == pytest.approx(effect([one[0], two[0]], list(runs)))

    table = np.array([list(logs[name].values()) for name in runs])
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    df = (len(runs) - 1) * (blocks - 1)
    columns = fit({name: logs[name] for name in runs}, runs, factors, generators, Rule(alpha=alpha))
    assert {column["terms"][0] for column in columns} >= set(factors)
    for column in columns:
        names = column["terms"][0].split("*")
        center = effect(names, list(runs))
        error = 2 ** len(names) * math.sqrt((rest**2).sum() / df / table.size)
        low, high = stats.t.interval(1 - alpha, df, center, error)
        assert (column["df"], column["n"], column["order"]) == (df, blocks, len(names))
        assert math.log(column["ratio"]) == pytest.approx(center)
        assert math.log(column["low"] or 0) == pytest.approx(low)
        assert math.log(column["high"] or 0) == pytest.approx(high)
        assert column["p"] == pytest.approx(2 * stats.t.sf(abs(center) / error, df), rel=1e-6)


# residuals, figures of a launch


@holds(fast=60, seed=SEEDS, cells=st.integers(2, 5), blocks=st.integers(3, 8), skewed=st.booleans())
def test_residuals_are_those_of_the_two_way_table(
    seed: int, cells: int, blocks: int, skewed: bool
) -> None:
    """Fitted by least squares with a dummy for each cell and block; a block that lacks a cell is
    left out.
    """
    rng = np.random.default_rng(seed)
    draw = rng.exponential if skewed else rng.normal
    values = {f"c{c}": {b: math.exp(draw()) for b in range(blocks)} for c in range(cells)}
    found = diagnose({**values, "c0": {**values["c0"], 99: 5.0}})
    assert found is not None
    rows = [(c, b) for c in range(cells) for b in range(blocks)]
    dummies = np.array(
        [[c == i for i in range(cells)] + [b == i for i in range(blocks)] for c, b in rows], float
    )
    logs = np.array([math.log(values[f"c{c}"][b]) for c, b in rows])
    rest = logs - dummies @ np.linalg.lstsq(dummies, logs, rcond=None)[0]
    sd = math.sqrt(float(rest @ rest) / ((cells - 1) * (blocks - 1)))
    largest = int(np.abs(rest).argmax())
    assert (found["n"], found["sd"]) == (len(rows), pytest.approx(sd))
    third = ((rest - rest.mean()) ** 3).mean()
    assert found["skewness"] == pytest.approx(third / (rest**2).mean() ** 1.5, abs=1e-6)
    assert found["p_normal"] == pytest.approx(stats.shapiro(rest).pvalue, rel=1e-4)
    # two residuals of one size where there are but two cells
    assert abs(found["largest"]) == pytest.approx(abs(rest[largest]) / sd)
    at = rows.index((int(found["cell"][1:]), found["block"]))
    assert rest[at] / sd == pytest.approx(found["largest"])


@holds(
    fast=100,
    requests=st.lists(
        st.tuples(st.floats(0, 5), st.floats(0.001, 5), st.floats(0.001, 50), st.integers(1, 40)),
        min_size=1,
        max_size=30,
    ),
    duration=st.floats(0.1, 100),
    known=st.sampled_from(["known", "unknown", "not reached"]),
)
def test_the_figures_of_a_launch_are_those_of_its_requests(
    requests: list[tuple[float, float, float, int]], duration: float, known: str
) -> None:
    """Tokens over seconds; percentiles over requests of the time to the first token, and of the time
    per token after it.
    """
    lengths = [n for *_, n in requests]
    times = [[a, a + first, a + first + rest] for a, first, rest, _ in requests]
    served = sum(lengths) - (known == "not reached")
    work: Any = {"output_tokens": served, "duration_s": duration, "request_times_s": times}
    found = of_launch(work, None if known == "unknown" else lengths)

    def percentile(values: list[float], percent: int) -> float:
        ordered, at = sorted(values), percent / 100 * (len(values) - 1)
        low = math.floor(at)
        high = min(low + 1, len(values) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    expected = {"output_tokens_per_s": served / duration}
    firsts = [time[1] - time[0] for time in times]
    gaps = [(time[2] - time[1]) / (n - 1) for time, n in zip(times, lengths, strict=True) if n > 1]
    for percent in PERCENTILES:
        expected[f"time_to_first_token_p{percent}_s"] = percentile(firsts, percent)
        if gaps and known == "known":
            expected[f"time_per_output_token_p{percent}_s"] = percentile(gaps, percent)
    assert found == pytest.approx(expected, rel=1e-6)


@holds(fast=60, rates=st.lists(st.floats(0.01, 1e6), min_size=1, max_size=20))
def test_rates_are_averaged_harmonically(rates: list[float]) -> None:
    assert harmonic_mean(rates) == pytest.approx(statistics.harmonic_mean(rates))
