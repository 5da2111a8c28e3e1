"""From the figures of a price to a verdict: non-inferiority to the unquantized reference.

`within margin` needs a test that rejects "as bad as the margin, or worse"; `outside` one that rejects
"as good as the margin, or better"; whatever neither rejects is `undecided`. That a difference was
not found never counts as equality. Both tests are one-sided. Their p-values are doubled: where a few
prompts cost most, the one-sided bootstrap errs up to twice as often as it says (coverage.py), and a
verdict then agrees with the two-sided interval beside it. They are adjusted over the metrics by
Holm's method (Holm, *A simple sequentially rejective multiple test procedure*, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from experiments.price.clusters import DRAWS, mean_per_token
from experiments.price.rules import METRICS
from experiments.records.types import PricedPrompts

PriceVerdict = Literal["within margin", "outside", "undecided"]
WITHIN: Literal["within margin"] = "within margin"
OUTSIDE: Literal["outside"] = "outside"
UNDECIDED: Literal["undecided"] = "undecided"


class Judgement(TypedDict):
    """One metric of a price, per token. price: the engine's figure less the noise floor's, with its
    interval (low, high), which is not corrected for several metrics.
    """

    metric: str
    price: float
    low: float
    high: float
    engine: float
    floor: float
    margin: float
    p_within: float
    p_outside: float
    verdict: PriceVerdict


def judge(
    prompts: PricedPrompts,
    margins: Mapping[str, float],
    level: float,
    seed: str,
    draws: int = DRAWS,
) -> list[Judgement]:
    """Every metric's judgement, in the order of rules.METRICS. seed, draws: of the bootstrap.

    The floor is subtracted prompt by prompt, because engine and floor read the same tokens: what
    makes a prompt sensitive to rounding cancels.
    """
    tokens, found = prompts["tokens"], []
    for metric in METRICS:
        engine, floor = prompts["engine"][metric], prompts["floor"][metric]
        excess = [a - b for a, b in zip(engine, floor, strict=True)]
        is_count = metric == "top_choice"
        mean = mean_per_token(
            excess, tokens, f"{seed}/{metric}", draws, 1 / sum(tokens) if is_count else 0.0
        )
        low, high = mean.interval(level)
        p_within = mean.p_below(margins[metric])
        if is_count:
            # Few lost tokens say little of how many there might be, however alike the prompts are:
            # never less than if tokens were lost one by one, independently (Poisson).
            lost = max(0, math.ceil(sum(excess)))
            p_within = max(p_within, poisson_cdf(lost, margins[metric] * sum(tokens)))
            high = max(high, poisson_limit(lost, level / 2) / sum(tokens))
        row: Judgement = {
            "metric": metric,
            "price": mean.mean,
            "low": low,
            "high": high,
            "engine": sum(engine) / sum(tokens),
            "floor": sum(floor) / sum(tokens),
            "margin": margins[metric],
            "p_within": min(1.0, 2 * p_within),
            "p_outside": min(1.0, 2 * mean.p_above(margins[metric])),
            "verdict": UNDECIDED,
        }
        found.append(row)
    for side in ("p_within", "p_outside"):
        adjusted = holm([row[side] for row in found])  # type: ignore[literal-required]
        for row, p in zip(found, adjusted, strict=True):
            row[side] = p  # type: ignore[literal-required]
    for row in found:
        if row["p_within"] <= level:
            row["verdict"] = WITHIN
        elif row["p_outside"] <= level:
            row["verdict"] = OUTSIDE
    return found


def of_all(judgements: Sequence[Judgement]) -> PriceVerdict:
    """The verdict on a configuration: `outside` if any metric is, `within margin` if all are."""
    verdicts = {row["verdict"] for row in judgements}
    if OUTSIDE in verdicts:
        return OUTSIDE
    return WITHIN if verdicts == {WITHIN} else UNDECIDED


def poisson_cdf(k: int, mean: float) -> float:
    """P(X <= k) of a Poisson distribution."""
    # own code: hosts without SciPy judge, too
    logs = [i * math.log(mean) - mean - math.lgamma(i + 1) for i in range(k + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def poisson_limit(k: int, alpha: float) -> float:
    """The mean at which P(X <= k) is alpha: an upper limit for a count of k, by bisection."""
    low, high = float(k), 2.0 * k + 20 - 4 * math.log(alpha)
    for _ in range(60):
        middle = (low + high) / 2
        if middle > 0 and poisson_cdf(k, middle) < alpha:
            high = middle
        else:
            low = middle
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted
