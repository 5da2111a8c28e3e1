"""What is measured of one launch: figures taken from one workload's part of a launch record.

Throughput is output tokens over the time of the whole workload. Latencies are percentiles over the
requests of the launch; the launch, not the request, is the unit of analysis, so a percentile is one
number a launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.records.types import LoadRules, Plan, ServedWorkload
from reports.statistics import under_load
from reports.statistics.intervals import Better

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Metric:
    """One figure of a launch: its key, how it is called, its unit, and which direction is better."""

    key: str
    label: str
    unit: str
    better: Better


THROUGHPUT = Metric("output_tokens_per_s", "output tokens per second", "tok/s", "higher")
LATENCIES = tuple(
    Metric(f"{key}_p{percentile}_s", f"{label} p{percentile}", "s", "lower")
    for key, label in (
        ("time_to_first_token", "TTFT"),
        ("time_per_output_token", "TPOT"),
    )
    for percentile in PERCENTILES
)
METRICS = {metric.key: metric for metric in (THROUGHPUT, *LATENCIES)}
GOODPUT = Metric(
    "goodput_requests_per_s", "goodput (requests per second within the SLO)", "req/s", "higher"
)
SUSTAINABLE = Metric(
    "sustainable_requests_per_s", "sustainable rate within the SLO", "req/s", "higher"
)
LOAD_LATENCIES = tuple(
    Metric(f"{key}_p{percentile}_s", f"{label} p{percentile}", "s", "lower")
    for key, label in (("inter_token_latency", "ITL"), ("end_to_end", "E2E"))
    for percentile in PERCENTILES
)
LOAD_METRICS = {metric.key: metric for metric in (GOODPUT, SUSTAINABLE, *LOAD_LATENCIES)}
"""Those of workloads whose requests arrive over time."""
EVERY = METRICS | LOAD_METRICS


def metrics_of(plan: Plan) -> dict[str, Metric]:
    """The metrics that launches of a plan may have."""
    return EVERY if "load" in plan["study"] else METRICS


def of_launch(
    work: ServedWorkload,
    output_lengths: Sequence[int] | None,
    rules: LoadRules | None = None,
    cut: int = 0,
) -> dict[str, float]:
    """Every metric of one workload's part of a launch record that can be had from it. rules: those of
    the load, for requests that arrive over time, the first `cut` of which are left out
    (under_load.py).

    output_lengths: tokens asked of each request, in the order of `request_times_s`. A request's
    time per output token is (finish - first token) / (output tokens - 1); it is left out where the
    lengths are unknown or were not reached (a record holds only their sum).
    """
    if rules is not None and "load" in work:
        return under_load.of_launch(work, rules, PERCENTILES, cut)
    values = {THROUGHPUT.key: work["output_tokens"] / work["duration_s"]}
    times = np.array(work["request_times_s"], dtype=np.float64).reshape(
        -1, 3
    )  # [requests, (arrival, first token, finish)]
    if not len(times):
        return values
    _add_percentiles(values, "time_to_first_token", times[:, 1] - times[:, 0])
    if (
        output_lengths is not None
        and len(output_lengths) == len(times)
        and sum(output_lengths) == work["output_tokens"]
    ):
        gaps = np.array(output_lengths) - 1
        if (gaps > 0).any():
            _add_percentiles(
                values,
                "time_per_output_token",
                ((times[:, 2] - times[:, 1])[gaps > 0]) / gaps[gaps > 0],
            )
    return values


def _add_percentiles(values: dict[str, float], key: str, samples: np.ndarray) -> None:
    for percentile, value in zip(PERCENTILES, np.percentile(samples, PERCENTILES), strict=True):
        if value > 0:  # a ratio of latencies needs both above the clock's resolution
            values[f"{key}_p{percentile}_s"] = float(value)


def harmonic_mean(rates: Sequence[float]) -> float:
    """Mean rate of equal pieces of work: n over the sum of times a piece (Hoefler and Belli, rule
    3).
    """
    return len(rates) / sum(1 / rate for rate in rates)
