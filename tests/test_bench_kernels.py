"""ablations/bench_kernels.py without a GPU: how it orders, counts and compares. The kernels themselves run on a GPU only."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


def test_a_ratio_is_paired_and_has_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from ablations import bench_kernels as bench

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran: list[str] = []
    case = bench.Case("group", "shape", {n: (lambda _, n=n: ran.append(n)) for n in ("triton", "torch")}, 1000, 4e6, calls=0)
    rng = random.Random(0)

    def clock(function: object) -> float:
        """A card that drifts by half, and a twin that takes four times as long, give or take a percent."""
        function()  # type: ignore[operator]
        slow = 1 + len(ran) / 120
        return (1e-6 if ran[-1] == "triton" else 4e-6 * rng.uniform(0.99, 1.01)) * slow

    times = bench.measure(case, clock, random.Random(1))
    assert {name: len(rounds) for name, rounds in times.items()} == {"triton": bench.ROUNDS, "torch": bench.ROUNDS}
    firsts = {ran[i] for i in range(2, len(ran), 2)}
    assert firsts == {"triton", "torch"}, "each comes first in some round"
    rows = {row["extra_info"]["implementation"]: row for row in bench.entries(case, times, 2e9)}
    ratio, low, high = rows["torch"]["extra_info"]["times_slower_than_triton"]
    assert low < 4 < high
    assert high - low < 0.1, "drift is not noise: rounds are paired"
    assert low < ratio < high
    info, stats = rows["triton"]["extra_info"], rows["triton"]["stats"]
    assert info["gb_per_s"] == pytest.approx(1000 / stats["median"] / 1e9)
    assert info["share_of_copy_bandwidth"] == pytest.approx(1000 / stats["median"] / 2e9)
    assert info["tflop_per_s"] == pytest.approx(4e6 / stats["median"] / 1e12)
