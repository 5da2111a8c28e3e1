"""The statistics of one effect: interval, p-value, minimum detectable effect, verdict.

The sample of an effect is one log-ratio a block, log(cell / baseline of the same block), so that
whatever a block shares (the machine's temperature, its neighbours) cancels. Blocks are the level
that varies (Kalibera and Jones, ISMM'13). Student's t over the blocks comes first: at six blocks a
percentile bootstrap covers far less than it says. The bootstrap stands beside it.
"""

import hashlib
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.study.block_count import MIN_BLOCKS_BOOTSTRAP, POWER, detectable
from reports.statistics.moderation import Prior, settle

BOOTSTRAP_RESAMPLES = 9_999
_LARGEST_LOG = math.log(sys.float_info.max)

Better = Literal["higher", "lower"]


class Judged(TypedDict):
    """An interval and a p-value. None: too few blocks to tell.

    `judge` writes the rest: p_holm, corrected for the `tests` that are made together, the verdict,
    and `leans`, the side of 1 on which the whole interval lies (faster or slower; None if it holds 1).
    """

    low: float | None
    high: float | None
    p: float | None
    p_holm: NotRequired[float | None]
    verdict: NotRequired[str]
    tests: NotRequired[int]
    leans: NotRequired[str | None]


class Estimate(Judged):
    """One effect, as `estimate` describes it."""

    n: int
    ratio: float | None
    boot_low: float | None
    boot_high: float | None
    sd_log: float | None
    detectable: float | None
    by_block: dict[str, float]
    sd_used: NotRequired[float]
    df: NotRequired[float]


class _Moderated(TypedDict):
    low: float
    high: float
    p: float
    detectable: float
    sd_used: float
    df: float


@dataclass(frozen=True)
class Rule:
    """How effects of a study are judged; fixed in the plan, before anything runs.

    alpha: error rate of tests; intervals have confidence 1 - alpha.
    smallest_effect: the smallest relative change that matters (0.05: ratios from 1/1.05 to 1.05 are
    as good as equal).
    power: of the test that the minimum detectable effect belongs to.
    seed: any text; the bootstrap of each effect is seeded from it and the effect's name.
    rounding: by metric and workload, the standard deviation that the rounding of a metric alone gives
    a log-ratio: of a metric that is a count, or a rate from a grid (noise.py).
    """

    alpha: float = 0.05
    smallest_effect: float = 0.05
    power: float = POWER
    seed: str = ""
    rounding: Mapping[tuple[str, str], float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it must lie between 0 and 1")
        if not self.smallest_effect > 0:
            raise ValueError(
                f"smallest_effect is {self.smallest_effect}; it must be greater than 0 (0.05 for 5 %)"
            )

    @property
    def band(self) -> tuple[float, float]:
        """Ratios that do not matter: symmetric on the log scale."""
        return 1 / (1 + self.smallest_effect), 1 + self.smallest_effect


def measured_ratio(effect: Estimate) -> float:
    """The ratio of an effect that was measured in at least one block."""
    assert effect["ratio"] is not None
    return effect["ratio"]


def t_interval(
    samples: NDArray[np.float64], alpha: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Student's t interval for the mean, along the last axis: [..., n] -> low [...], high [...].
    Needs n >= 2.
    """
    n = samples.shape[-1]
    if n < 2:
        raise ValueError(f"an interval needs at least 2 samples, got {n}")
    mean = samples.mean(axis=-1)
    error, quantile = samples.std(axis=-1, ddof=1) / math.sqrt(n), stats.t.ppf(1 - alpha / 2, n - 1)
    # a tiny alpha's quantile is infinite
    half = np.multiply(quantile, error, out=np.zeros_like(error), where=error > 0)
    return mean - half, mean + half


def ratio_of(log_ratio: float) -> float:
    """exp, infinite where a float cannot hold it: the interval of a tiny alpha reaches that far."""
    return math.exp(log_ratio) if log_ratio < _LARGEST_LOG else math.inf


def t_test(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-sided p-value of "the mean is 0", along the last axis. Without any spread: 1 for a mean
    of 0, else 0.
    """
    n = samples.shape[-1]
    mean = samples.mean(axis=-1)
    error = samples.std(axis=-1, ddof=1) / math.sqrt(n)
    spread = error > 0
    t = np.divide(mean, error, out=np.where(mean == 0, 0.0, np.inf), where=spread)
    return 2 * stats.t.sf(np.abs(t), n - 1)


def bootstrap_interval(
    samples: NDArray[np.float64], alpha: float, seed: str
) -> tuple[float, float] | None:
    """Bias-corrected and accelerated bootstrap (Efron 1987) for the mean of one sample [n], seeded
    by a text; None where it has
    no number: at an alpha far below one in as many resamples."""
    # every resample is the sample: BCa divides by zero, the interval is a point
    if np.ptp(samples) == 0:
        return float(samples[0]), float(samples[0])
    digest = hashlib.sha256(seed.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        result = stats.bootstrap(
            (samples,),
            np.mean,
            confidence_level=1 - alpha,
            n_resamples=BOOTSTRAP_RESAMPLES,
            method="BCa",
            rng=rng,
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values (Holm 1979).

    Not statsmodels' `multipletests`, which collects garbage at every call: four fifths of the time
    of a report.
    """
    p = np.array(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


def estimate(
    log_ratios: Mapping[int, float],
    rule: Rule,
    name: str,
    prior: Prior | None = None,
    scale: float = 1.0,
    least_sd: float = 0.0,
) -> Estimate:
    """Estimate one effect from {block: log-ratio}; everything in it is a ratio (1.0: no effect)
    unless it says otherwise.

    ratio: geometric mean over blocks; low, high: the t interval; boot_low, boot_high: BCa; p:
    unadjusted;
    detectable: the smallest relative change (0.03: 3 %) that this many blocks of this noise find
    with the rule's power. None stands for what so few blocks cannot tell.

    prior: of a study with moderated variances (moderation.py). Then interval, p and detectable
    effect are of the moderated variance: sd_used and its degrees of freedom, df, beside sd_log, the
    effect's own. scale: variance of what the samples are, over that of a log-ratio of two cells, if
    all launches were equally noisy. least_sd: no sample is taken to be less noisy than this, however
    equal a few of them are (Rule.rounding).
    """
    blocks = sorted(log_ratios)
    samples = np.array([log_ratios[block] for block in blocks], dtype=np.float64)
    n = len(blocks)
    effect: Estimate = {
        "n": n,
        "ratio": math.exp(samples.mean()) if n else None,
        "low": None,
        "high": None,
        "boot_low": None,
        "boot_high": None,
        "sd_log": None,
        "p": None,
        "detectable": None,
        "by_block": {
            str(block): math.exp(value) for block, value in zip(blocks, samples, strict=True)
        },
    }
    if n < 2:
        return effect
    low, high = t_interval(samples, rule.alpha)
    sd = float(samples.std(ddof=1))
    effect |= {
        "low": ratio_of(float(low)),
        "high": ratio_of(float(high)),
        "sd_log": sd,
        "p": float(t_test(samples)),
        "detectable": detectable(sd, n, rule.alpha, rule.power),
    }
    if sd < least_sd:
        effect = {**effect, **_of_variance(samples, rule, least_sd**2, n - 1)}
    if prior is not None:
        effect = {**effect, **_moderated(samples, rule, prior, scale, least_sd)}
    if n >= MIN_BLOCKS_BOOTSTRAP:
        if (boot := bootstrap_interval(samples, rule.alpha, f"{rule.seed}/{name}")) is None:
            return effect
        boot_low, boot_high = boot
        effect |= {"boot_low": ratio_of(boot_low), "boot_high": ratio_of(boot_high)}
    return effect


def _moderated(
    samples: NDArray[np.float64], rule: Rule, prior: Prior, scale: float, least_sd: float
) -> _Moderated:
    """What a moderated variance changes of an effect."""
    n, own = len(samples), float(samples.var(ddof=1))
    variance, df = map(float, settle(own, n - 1, prior.df, scale * prior.variance))
    return _of_variance(samples, rule, max(variance, least_sd**2), df)


def _of_variance(
    samples: NDArray[np.float64], rule: Rule, variance: float, df: float
) -> _Moderated:
    """Interval, p-value and detectable effect with another variance than the samples' own."""
    n, mean = len(samples), float(samples.mean())
    error, quantile = math.sqrt(variance / n), float(stats.t.ppf(1 - rule.alpha / 2, df))
    return {
        "low": ratio_of(mean - quantile * error),
        "high": ratio_of(mean + quantile * error),
        "p": float(2 * stats.t.sf(abs(mean) / error, df)),
        "detectable": detectable(math.sqrt(variance), n, rule.alpha, rule.power, df),
        "sd_used": math.sqrt(variance),
        "df": df,
    }


def judge(family: Sequence[Judged], rule: Rule, better: Better = "higher") -> None:
    """Write `p_holm`, `tests`, `verdict` and `leans` into every effect of one family (effects judged
    together).
    """
    tested = [(effect, p) for effect in family if (p := effect["p"]) is not None]
    for (effect, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        effect["p_holm"] = p
    for effect in family:
        effect.setdefault("p_holm", None)
        effect["tests"] = len(tested)
        effect["verdict"] = verdict(effect["low"], effect["high"], effect["p_holm"], rule, better)
        effect["leans"] = leaning(effect["low"], effect["high"], better)


def leaning(low: float | None, high: float | None, better: Better = "higher") -> str | None:
    """The side of 1 on which a whole interval lies, faster or slower; None if it contains 1."""
    if low is None or high is None or low <= 1 <= high:
        return None
    return "faster" if (low > 1) == (better == "higher") else "slower"


def verdict(
    low: float | None,
    high: float | None,
    p_holm: float | None,
    rule: Rule,
    better: Better = "higher",
) -> str:
    """equivalent | faster | slower | inconclusive, from the t interval of a ratio and its adjusted
    p-value.

    equivalent: the whole interval lies inside the band, even if it excludes 1: a real difference
    too small to matter.
    faster, slower: otherwise, the adjusted test rejects "no difference".
    inconclusive: neither, or no interval at all.
    """
    if low is None or high is None or p_holm is None:
        return "inconclusive"
    band_low, band_high = rule.band
    if band_low < low and high < band_high:
        return "equivalent"
    if p_holm >= rule.alpha:
        return "inconclusive"
    return "faster" if (low > 1) == (better == "higher") else "slower"
