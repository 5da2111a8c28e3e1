"""A modelled scaling curve, for claims about more GPUs than there are. Labelled as a model, because it
is not a measurement.

    step(d)         = fixed + sharded / d + 2 * layers * all_reduce(d)
    one-shot(d)     = latency + (d - 1) * bytes / bandwidth             what a rank reads of its peers' memory
    two-shot(d)     = 2 * latency + 2 * (d - 1) / d * bytes / bandwidth
    all_reduce(d)   = the faster of the two

latency and bandwidth: fitted to all-reduces measured on two GPUs. fixed and sharded: from decode
steps measured on one GPU and two.
Assumed: every pair of GPUs is linked as those two are, all at once (NVSwitch); a barrier of d ranks
costs what one of two does; no rank waits for a slower one. Each makes the model's efficiency an
upper bound. Units: seconds, bytes.

    python -m reports.claims.scaling_model all-reduce.json --layers 36 --hidden 4096 --batch 64 --step-ms-1
    9.1 --step-ms-2 5.3
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AllReduce:
    """latency_s + bytes / bandwidth_bytes_per_s is what a one-shot sum of two ranks takes."""

    latency_s: float
    bandwidth_bytes_per_s: float

    @classmethod
    def fit(cls, points: Iterable[tuple[int, float]]) -> AllReduce:
        """Least squares of relative errors over (bytes, seconds) of one-shot sums of two ranks.
        Raises ValueError for fewer than two sizes, or times that do not grow with size.
        """
        rows = [(nbytes, seconds, 1.0 / seconds**2) for nbytes, seconds in points]
        if len({nbytes for nbytes, _, _ in rows}) < 2:
            raise ValueError(f"{len(rows)} all-reduces of one size; a fit needs two sizes or more")
        total = sum(w for _, _, w in rows)
        mean_x, mean_y = (sum(w * row[i] for *row, w in rows) / total for i in (0, 1))
        slope = sum(w * (x - mean_x) * (y - mean_y) for x, y, w in rows) / sum(
            w * (x - mean_x) ** 2 for x, _, w in rows
        )
        if slope <= 0:
            raise ValueError(
                "larger all-reduces took no longer: there is no bandwidth in these measurements"
            )
        return cls(max(0.0, mean_y - slope * mean_x), 1.0 / slope)

    def seconds(self, degree: int, nbytes: int) -> float:
        """How long a sum over `degree` ranks takes."""
        if degree == 1:
            return 0.0
        one_shot = self.latency_s + (degree - 1) * nbytes / self.bandwidth_bytes_per_s
        two_shot = (
            2 * self.latency_s + 2 * (degree - 1) / degree * nbytes / self.bandwidth_bytes_per_s
        )
        return min(one_shot, two_shot)


@dataclass(frozen=True)
class Step:
    """The model of a decode step: work that every rank repeats, work that ranks share, and all-
    reduces.
    """

    fixed_s: float
    sharded_s: float
    num_sums: int
    bytes_per_sum: int

    @classmethod
    def from_measured(
        cls, step_1_s: float, step_2_s: float, num_sums: int, bytes_per_sum: int, sums: AllReduce
    ) -> Step:
        """From steps on one GPU and on two. Raises ValueError where the second is too fast for the
        model.
        """
        computing_2_s = step_2_s - num_sums * sums.seconds(2, bytes_per_sum)
        sharded_s = 2 * (step_1_s - computing_2_s)
        if not 0 < sharded_s <= step_1_s:
            raise ValueError(
                f"steps of {step_1_s:g} and {step_2_s:g} s leave {sharded_s:g} s to share: the model does not hold"
            )
        return cls(step_1_s - sharded_s, sharded_s, num_sums, bytes_per_sum)

    def seconds(self, degree: int, sums: AllReduce) -> float:
        return (
            self.fixed_s
            + self.sharded_s / degree
            + self.num_sums * sums.seconds(degree, self.bytes_per_sum)
        )

    def efficiency(self, degree: int, sums: AllReduce) -> float:
        """Throughput over `degree` times that of one GPU, at the same batch."""
        return self.seconds(1, sums) / degree / self.seconds(degree, sums)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reports.claims.scaling_model", description="A modelled scaling curve."
    )
    parser.add_argument(
        "all_reduce",
        type=Path,
        help="all-reduce.json of benchmarks/gpu_tp.py, measured on two GPUs",
    )
    parser.add_argument(
        "--kind", default="one_shot", help="of its rows, which one is fitted (default: one_shot)"
    )
    for name, help_text in (
        ("layers", "of the model"),
        ("hidden", "its width"),
        ("batch", "requests in a step"),
    ):
        parser.add_argument(f"--{name}", type=int, required=True, help=help_text)
    for degree in (1, 2):
        parser.add_argument(
            f"--step-ms-{degree}",
            type=float,
            required=True,
            help=f"of a decode step on {degree} GPU(s), measured",
        )
    given = parser.parse_args()
    rows = json.loads(given.all_reduce.read_text())["rows"]
    sums = AllReduce.fit(
        (r["bytes"], r["graph_us"] / 1e6)
        for r in rows
        if r["kind"] == given.kind and "graph_us" in r
    )
    print(
        f"fitted: {sums.latency_s * 1e6:.1f} us + bytes / {sums.bandwidth_bytes_per_s / 1e9:.0f} GB/s"
    )
    step = Step.from_measured(
        given.step_ms_1 / 1e3,
        given.step_ms_2 / 1e3,
        2 * given.layers,
        given.batch * given.hidden * 2,
        sums,
    )
    print(
        f"step: {step.fixed_s * 1e3:.3f} ms on every rank, {step.sharded_s * 1e3:.3f} ms shared, {step.num_sums} sums of "
        f"{step.bytes_per_sum} bytes"
    )
    for degree in (1, 2, 4, 8):
        label = "measured" if degree <= 2 else "modelled"
        step_ms, efficiency = step.seconds(degree, sums) * 1e3, step.efficiency(degree, sums)
        print(f"{degree} GPUs: {step_ms:7.3f} ms a step, efficiency {efficiency:6.1%} ({label})")


if __name__ == "__main__":
    main()
