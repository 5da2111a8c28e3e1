"""What one launch shows of a workload whose requests arrive over time: latencies, goodput, whether it
ran long enough, and whether it kept up.

Latencies are those of experiments/load/objective.py, and count from a request's due time. The initial
transient, which finds the queue empty, is left out: MSER-5 over all launches of a workload
(steady_state.py).

A percentile needs samples beyond it. The interval of a percentile within a launch is the distribution-
free one of order statistics (the rank of the percentile is binomial). Requests that wait for each other
are not independent, so it uses an effective number of samples, from the autocorrelation of "above or
below the percentile", by Geyer's initial positive sequence ("Practical Markov chain Monte Carlo", 1992).
It is descriptive: claims rest on intervals over launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.load.delivered import unpack
from experiments.records.types import LoadRules, Objective, ServedWorkload
from reports.statistics.steady_state import Floats, common_cut, growth, has_trend

State = Literal["steady", "too short", "trend", "overloaded"]

LEAST_REQUESTS = 40
"""With fewer requests after the cut, steadiness cannot be tested."""
OVERLOAD_GROWTH = 0.1
"""Overloaded: the backlog grows by more than this share of the arrivals."""
LATENCY_OF = {
    "time_to_first_token": "ttft_s",
    "time_per_output_token": "tpot_s",
    "inter_token_latency": "itl_s",
    "end_to_end": "e2e_s",
}
"""Metrics and the names of their limits in an objective."""


@dataclass(frozen=True)
class Requests:
    """The requests of one serving in the order of their due times. gaps_s: those between the tokens
    of each request.
    """

    due_s: Floats
    first_s: Floats
    finish_s: Floats
    gaps_s: list[Floats]

    @classmethod
    def of(cls, work: ServedWorkload) -> Requests:
        """From a record of a workload with arrivals whose requests all finished."""
        times = np.array(work["request_times_s"], dtype=np.float64).reshape(-1, 3)
        gaps = unpack(work["load"]["token_gaps_us"])
        order = np.argsort(times[:, 0], kind="stable")
        ordered = times[order]
        return cls(
            ordered[:, 0],
            ordered[:, 1],
            ordered[:, 2],
            [np.array(gaps[index], dtype=np.float64) / 1e6 for index in order],
        )

    def __len__(self) -> int:
        return len(self.due_s)

    def after(self, cut: int) -> Requests:
        """Without the first `cut` requests."""
        return Requests(
            self.due_s[cut:], self.first_s[cut:], self.finish_s[cut:], self.gaps_s[cut:]
        )

    def latencies(self) -> dict[str, Floats]:
        """Samples of each latency, in order. inter_token_latency has one for each gap, the others one
        for each request; a request of one token has no time per output token.
        """
        return {
            "time_to_first_token": self.first_s - self.due_s,
            "time_per_output_token": np.array([gaps.mean() for gaps in self.gaps_s if len(gaps)]),
            "inter_token_latency": np.concatenate([*self.gaps_s, np.empty(0)]),
            "end_to_end": self.finish_s - self.due_s,
        }

    def met(self, objective: Objective) -> NDArray[np.bool_]:
        """Which requests met an objective, as experiments.load.objective.meets judges them."""
        found: dict[str, Floats] = {
            "ttft_s": self.first_s - self.due_s,
            "e2e_s": self.finish_s - self.due_s,
            "tpot_s": np.array([gaps.mean() if len(gaps) else 0.0 for gaps in self.gaps_s]),
            "itl_s": np.array([gaps.max() if len(gaps) else 0.0 for gaps in self.gaps_s]),
        }
        kept = np.ones(len(self), dtype=bool)
        for name, limit in objective.items():
            kept &= found[name] <= limit  # type: ignore[operator]
        return kept

    def rate(self) -> float | None:
        """Requests per second, from the first due time to the last; None if all are due at once."""
        span_s = self.due_s[-1] - self.due_s[0] if len(self) > 1 else 0.0
        return (len(self) - 1) / float(span_s) if span_s > 0 else None

    def backlog(self) -> Floats:
        """The number of requests in the system just after each arrival."""
        arrived = np.searchsorted(self.due_s, self.due_s, side="right")
        gone = np.searchsorted(np.sort(self.finish_s), self.due_s, side="right")
        return (arrived - gone).astype(np.float64)


@dataclass(frozen=True)
class Quantile:
    """A percentile of one launch and its interval; low and high are None where `samples`, the
    effective number, is smaller than `needed`.
    """

    value: float
    low: float | None
    high: float | None
    samples: float
    needed: int


def samples_needed(share: float, confidence: float = 0.95) -> int:
    """The least number of independent samples with which a percentile has a two-sided interval: the
    largest of them is below the percentile with a probability of at most half of 1 - confidence
    (and the smallest above it). 6 for the median, 36 for p90, 368 for p99 at 95 %.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; allowed: above 0 and below 1 (0.99 for p99)")
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(share, 1 - share)))


def quantile(samples: Floats, share: float, confidence: float = 0.95) -> Quantile:
    """A percentile of samples in the order of time [n], with its interval of order statistics."""
    value = float(np.quantile(samples, share))
    effective = effective_samples(samples <= value)
    needed = samples_needed(share, confidence)
    if effective < needed:
        return Quantile(value, None, None, effective, needed)
    low, high = interval_ranks(math.floor(effective), share, confidence)
    scale = (len(samples) + 1) / (math.floor(effective) + 1)
    ordered = np.sort(samples)
    return Quantile(
        value,
        float(ordered[max(1, math.floor(low * scale)) - 1]),
        float(ordered[min(len(samples), math.ceil(high * scale)) - 1]),
        effective,
        needed,
    )


def interval_ranks(n: int, share: float, confidence: float = 0.95) -> tuple[int, int]:
    """The ranks (1 to n) of the two order statistics that hold a percentile between them with at
    least this confidence, each tail apart. n: at least samples_needed.
    """
    tail = (1 - confidence) / 2
    ranks = np.arange(1, n + 1)
    below = stats.binom.cdf(ranks - 1, n, share)  # of a rank: the percentile lies below it
    fine = ranks[below <= tail]
    return int(fine[-1]), int(ranks[below >= 1 - tail][0])


def effective_samples(above: NDArray[np.bool_]) -> float:
    """How many independent samples a correlated series of yes and no is worth for its mean."""
    n = len(above)
    centred = above.astype(np.float64) - above.mean()
    variance = float(centred @ centred) / n
    if n < 4 or variance == 0:
        return float(n)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    correlation = np.fft.irfft(spectrum * spectrum.conj(), size)[:n] / (n * variance)
    pairs = correlation[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    stop = np.flatnonzero(pairs <= 0)
    positive = pairs[: stop[0]] if len(stop) else pairs
    # the first pair holds the correlation of a sample with itself
    return float(min(n, n / max(2 * positive.sum() - 1, 1e-9)))


@dataclass(frozen=True)
class Transient:
    """The initial transient of launches that served the same requests. found: False where MSER-5 has
    its minimum in the second half: the launches are too short to tell, and nothing is cut.
    """

    cut: int
    found: bool


def transient(launches: Sequence[Requests]) -> Transient:
    """From all launches of a workload, all cells. An overloaded one has no steady state before which
    there could be a transient, and takes no part; 0 where all are.
    """
    able = [launch for launch in launches if not overloaded(launch)]
    if not able:
        return Transient(0, True)
    cut = common_cut([launch.first_s - launch.due_s for launch in able])
    return Transient(0, False) if cut is None else Transient(cut, True)


def overloaded(requests: Requests) -> bool:
    """Whether the backlog grows over the whole run, in a trend."""
    backlog = requests.backlog()
    return growth(backlog) > OVERLOAD_GROWTH and has_trend(backlog)


def steadiness(requests: Requests, start: Transient) -> State:
    """Whether what follows the transient is a steady state."""
    kept = requests.after(start.cut)
    if len(requests) < LEAST_REQUESTS:
        return "too short"
    if overloaded(requests):
        return "overloaded"
    if not start.found or len(kept) < LEAST_REQUESTS:
        return "too short"
    return "trend" if has_trend(kept.first_s - kept.due_s) else "steady"


def of_launch(
    work: ServedWorkload, rules: LoadRules, percentiles: tuple[int, ...], cut: int
) -> dict[str, float]:
    """Every metric of a workload with arrivals that its record supports, without the first `cut`
    requests. A percentile for which there
    are too few requests after the cut, or gaps between tokens, is left out even if they were
    independent (whether they are worth as many matters to the percentile of the process, not to a
    ratio of two cells that served the same arrivals); goodput and the
    sustainable rate are left out where they are 0 or there is no objective.
    """
    requests = Requests.of(work)
    kept = requests.after(cut)
    values = {"output_tokens_per_s": work["output_tokens"] / work["duration_s"]}
    for metric, samples in kept.latencies().items():
        for percentile in percentiles:
            if len(samples) < samples_needed(percentile / 100):
                continue
            value = float(np.percentile(samples, percentile))
            if value > 0:  # a ratio of latencies needs both above the clock's resolution
                values[f"{metric}_p{percentile}_s"] = value
    if rules["slo"] is not None:
        good = goodput(kept, rules["slo"])
        if good:
            values["goodput_requests_per_s"] = good
        found = work["load"].get("search")
        if found and found["rate"] is not None:
            values["sustainable_requests_per_s"] = found["rate"]
    return values


def goodput(requests: Requests, objective: Objective) -> float | None:
    """Requests per second that met the objective: their share times the rate at which requests came.
    None if all are due at once.
    """
    rate = requests.rate()
    return None if rate is None else float(requests.met(objective).mean()) * rate


def described(work: ServedWorkload, rules: LoadRules, start: Transient) -> dict[str, Any]:
    """What a report says of one launch's load: state, cut, the share of requests that met the
    objective, and every percentile with its interval within the launch.
    """
    requests = Requests.of(work)
    kept = requests.after(start.cut)
    load = work["load"]
    return {
        "state": steadiness(requests, start),
        "cut": start.cut,
        "growth": growth(requests.backlog()),
        "requests": len(requests),
        "kept": len(kept),
        "offered": requests.rate(),
        "delivered": load["delivered"],
        "lateness_p99_s": load["lateness_p99_s"],
        "attained": None if rules["slo"] is None else float(kept.met(rules["slo"]).mean()),
        "goodput": None if rules["slo"] is None else goodput(kept, rules["slo"]),
        "search": load.get("search"),
        "quantiles": {
            metric: {
                percentile: quantile(samples, percentile / 100)
                for percentile in (50, 90, 99)
                if len(samples) > 1
            }
            for metric, samples in kept.latencies().items()
        },
    }
