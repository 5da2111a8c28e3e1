"""benchmarks/bench_kernels.py without a GPU: how it orders, counts and compares. The kernels
themselves run on a GPU only.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


def test_a_ratio_is_paired_and_has_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_kernels as bench

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran: list[str] = []
    case = bench.Case(
        "group",
        "shape",
        {n: (lambda _, n=n: ran.append(n)) for n in ("triton", "torch")},
        1000,
        4e6,
        calls=0,
    )
    rng = random.Random(0)

    def clock(function: object) -> float:
        """A card that drifts by half, and a twin that takes four times as long, give or take a
        percent.
        """
        function()  # type: ignore[operator]
        slow = 1 + len(ran) / 120
        return (1e-6 if ran[-1] == "triton" else 4e-6 * rng.uniform(0.99, 1.01)) * slow

    times = bench.measure(case, clock, random.Random(1))
    assert {name: len(rounds) for name, rounds in times.items()} == {
        "triton": bench.ROUNDS,
        "torch": bench.ROUNDS,
    }
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


def test_the_share_of_host_time_that_graphs_save() -> None:
    from benchmarks.host_time import host_us_a_step, share_saved

    def launch(block: int, cell: str, host_ms: float) -> dict[str, object]:
        """Ten steps of 5 ms, of which the host worked host_ms and else waited."""
        work = {"step_times_s": [[5e-3, 0, 8]] * 10, "device_wait_s": (5 - host_ms) * 1e-2}
        return {"block": block, "cell": cell, "workloads": {"canonical": work}}

    launches = [
        launch(block, cell, ms * (1 + block / 10))
        for block in range(3)
        for cell, ms in (("off", 2.0), ("on", 0.5))
    ]
    saved = share_saved(launches, "canonical", "off", "on")
    assert saved["share_saved"] == pytest.approx(0.75)
    assert saved["low"] <= saved["share_saved"] <= saved["high"]
    assert saved["off_us"] == pytest.approx([2000, 2200, 2400])
    with pytest.raises(ValueError, match="1 blocks hold both"):
        share_saved(launches[:2], "canonical", "off", "on")
    with pytest.raises(ValueError, match="needs a GPU"):
        host_us_a_step({"step_times_s": [[1.0, 0, 1]], "device_wait_s": None})
