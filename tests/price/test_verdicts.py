"""Intervals and verdicts of prices: their formulas, and what they promise, by simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from experiments.price import coverage
from experiments.price.clusters import mean_per_token, ratio
from experiments.price.rules import METRICS
from experiments.price.verdicts import Judgement, holm, judge, of_all
from experiments.records.types import PricedPrompts

MARGINS = {"kl": 0.02, "top_choice": 0.01, "log_perplexity": 0.01}


def priced(
    kl: list[float],
    lost: list[float],
    log_perplexity: list[float],
    tokens: list[int],
    floor: float = 0.0,
) -> PricedPrompts:
    zeros = [0.0] * len(tokens)
    return {
        "tokens": tokens,
        "engine": {
            "kl": [k + floor * n for k, n in zip(kl, tokens, strict=True)],
            "top_choice": lost,
            "log_perplexity": log_perplexity,
        },
        "floor": {
            "kl": [floor * n for n in tokens],
            "top_choice": zeros,
            "log_perplexity": zeros,
        },
    }


def study(
    seed: int, kl: float, lost: float = 0.002, log_perplexity: float = 0.0, prompts: int = 64
) -> PricedPrompts:
    """Prompts whose prices per token have these true means; a skewed price for each prompt."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(32, 97, prompts)
    price = np.exp(rng.normal(-0.18, 0.6, prompts))
    return priced(
        (kl * price * rng.gamma(tokens)).tolist(),
        rng.binomial(tokens, np.minimum(1, lost * price)).astype(float).tolist(),
        (log_perplexity * tokens + rng.normal(0, 0.02, prompts) * np.sqrt(tokens)).tolist(),
        tokens.tolist(),
    )


def by_metric(found: list[Judgement]) -> dict[str, Judgement]:
    return {row["metric"]: row for row in found}


def test_the_mean_is_over_tokens_and_its_error_that_of_a_ratio() -> None:
    rng = random.Random(0)
    tokens = [rng.randint(10, 50) for _ in range(12)]
    totals = [n * rng.uniform(0, 2) for n in tokens]
    mean, error = ratio(np.array(totals), np.array(tokens, dtype=float))
    plain = sum(totals) / sum(tokens)
    residuals = [t - plain * n for t, n in zip(totals, tokens, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals) / 11 / 12)
    assert float(mean) == pytest.approx(plain)
    assert float(error) == pytest.approx(spread / (sum(tokens) / 12))


def test_tokens_of_one_prompt_are_not_counted_as_independent() -> None:
    """The same prompts with ten times the tokens, all alike, say no more."""
    totals, tokens = [1.0, 4.0, 2.0, 8.0, 3.0, 5.0], [10] * 6
    once = mean_per_token(totals, tokens, "a")
    often = mean_per_token([10 * t for t in totals], [100] * 6, "a")
    assert often.interval(0.05) == pytest.approx(once.interval(0.05))


def test_an_interval_is_the_same_every_time_and_another_for_another_seed() -> None:
    totals, tokens = [1.0, 4.0, 2.0, 8.0, 3.0, 5.0] * 4, [10] * 24
    first, again, other = (mean_per_token(totals, tokens, seed) for seed in ("a", "a", "b"))
    assert first.interval(0.05) == again.interval(0.05) != other.interval(0.05)
    low, high = first.interval(0.05)
    assert low < first.mean < high
    assert high - first.mean > first.mean - low  # the long tail is on this side


@pytest.mark.parametrize(
    ("totals", "tokens"), [([1.0], [10]), ([1.0, 2.0], [10]), ([1.0, 2.0], [10, 0])]
)
def test_too_little_for_an_interval_is_refused(totals: list[float], tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="two prompts or more"):
        mean_per_token(totals, tokens, "a")


def test_p_values_and_intervals_agree() -> None:
    found = mean_per_token([1.0, 4.0, 2.0, 8.0, 3.0, 5.0] * 5, [10] * 30, "a")
    low, high = found.interval(0.1)
    assert found.p_below(high) == pytest.approx(0.05, abs=0.002)  # the one-sided half of 10 %
    assert found.p_above(low) == pytest.approx(0.05, abs=0.002)
    assert found.p_below(found.mean + 1) < 0.001
    assert found.p_below(found.mean - 1) > 0.999


def test_holm_is_the_step_down_procedure() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6, 0.9]) == [1.0, 1.0, 1.0]


def test_a_small_price_is_within_and_a_large_one_outside() -> None:
    small = judge(study(1, kl=0.004), MARGINS, 0.05, "a")
    assert of_all(small) == "within margin"
    kl = by_metric(small)["kl"]
    assert kl["low"] < 0.004 < kl["high"] < 0.02
    large = judge(study(1, kl=0.05), MARGINS, 0.05, "a")
    assert by_metric(large)["kl"]["verdict"] == "outside"
    assert by_metric(large)["log_perplexity"]["verdict"] == "within margin"
    assert of_all(large) == "outside"


def test_a_price_at_the_margin_is_undecided_and_few_prompts_decide_nothing() -> None:
    at = judge(study(3, kl=0.02), MARGINS, 0.05, "a")
    assert by_metric(at)["kl"]["verdict"] == "undecided"
    assert of_all(at) == "undecided"
    few = judge(study(4, kl=0.012, prompts=4), MARGINS, 0.05, "a")
    assert of_all(few) == "undecided"


def test_no_lost_token_in_a_small_sample_is_no_proof() -> None:
    """No token of 200 was lost: one of a hundred may be, all the same."""
    tokens = [20] * 10
    nothing = priced([0.0] * 10, [0.0] * 10, [0.0] * 10, tokens)
    top = by_metric(judge(nothing, MARGINS, 0.05, "a"))["top_choice"]
    assert top["verdict"] == "undecided"
    assert top["high"] == pytest.approx(-math.log(0.025) / 200)
    many = priced([0.0] * 100, [0.0] * 100, [0.0] * 100, [20] * 100)
    assert of_all(judge(many, MARGINS, 0.05, "a")) == "within margin"


def test_the_noise_floor_is_subtracted_prompt_by_prompt() -> None:
    plain = by_metric(judge(study(5, kl=0.01), MARGINS, 0.05, "a"))["kl"]
    raised = study(5, kl=0.01)
    noisy = priced(
        raised["engine"]["kl"],
        raised["engine"]["top_choice"],
        raised["engine"]["log_perplexity"],
        raised["tokens"],
        floor=0.1,
    )
    found = by_metric(judge(noisy, MARGINS, 0.05, "a"))["kl"]
    assert found["price"] == pytest.approx(plain["price"])
    assert (found["low"], found["high"]) == pytest.approx((plain["low"], plain["high"]))
    assert found["floor"] == pytest.approx(0.1)
    assert found["engine"] == pytest.approx(0.1 + plain["price"])


def test_every_metric_is_judged_in_its_order() -> None:
    assert [row["metric"] for row in judge(study(6, 0.01), MARGINS, 0.05, "a")] == list(METRICS)


# What intervals and verdicts promise

ALLOWED = 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 1000)
"""What a share of at most 5 % may look like in a thousand studies."""


@pytest.mark.parametrize(("shape", "prompts"), [("alike", 32), ("skewed", 64)])
def test_intervals_cover_what_they_promise(shape: str, prompts: int) -> None:
    held, within = coverage.coverage(
        "bootstrap-t", prompts, coverage.SHAPES[shape], studies=1000, draws=299
    )
    assert 0.93 <= held <= 0.97
    assert within <= ALLOWED


def test_the_interval_that_was_not_chosen_fails_where_the_chosen_one_holds() -> None:
    """Student's t calls more within margin than it may, where prompts differ much."""
    shape = coverage.SHAPES["very skewed"]
    _, by_t = coverage.coverage("Student's t", 48, shape, studies=1000)
    _, chosen = coverage.coverage("bootstrap-t", 48, shape, studies=500, draws=299)
    assert by_t > ALLOWED
    assert chosen < by_t


@pytest.mark.parametrize(
    ("metric", "true"),
    [
        ("kl", {"kl": 0.02}),
        ("top_choice", {"kl": 0.002, "lost": 0.01}),
        ("log_perplexity", {"kl": 0.002, "log_perplexity": 0.01}),
    ],
)
def test_at_the_margin_false_within_is_at_most_the_level(
    metric: str, true: dict[str, float]
) -> None:
    studies = 300
    false = sum(
        by_metric(judge(study(seed, **true), MARGINS, 0.05, "a", 299))[metric]["verdict"]
        == "within margin"
        for seed in range(studies)
    )
    assert false / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)
