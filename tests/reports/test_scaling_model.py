"""The modelled scaling curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reports.claims import scaling_model
from reports.claims.scaling_model import AllReduce, Step

SUMS = AllReduce(6e-6, 150e9)


def test_a_fit_recovers_what_was_measured() -> None:
    points = [
        (n, (6e-6 + n / 150e9) * (1 + 0.01 * (-1) ** i))
        for i, n in enumerate(2048 << k for k in range(12))
    ]
    found = AllReduce.fit(points)
    assert found.latency_s == pytest.approx(6e-6, rel=0.02)
    assert found.bandwidth_bytes_per_s == pytest.approx(150e9, rel=0.03)
    with pytest.raises(ValueError, match="a fit needs two sizes"):
        AllReduce.fit(points[:1])
    with pytest.raises(ValueError, match="no bandwidth"):
        AllReduce.fit([(1, 2.0), (2, 1.0)])


def test_measured_degrees_are_reproduced_and_others_follow_the_stated_formula() -> None:
    truth = Step(fixed_s=1e-3, sharded_s=8e-3, num_sums=72, bytes_per_sum=64 * 4096 * 2)
    step = Step.from_measured(
        truth.seconds(1, SUMS), truth.seconds(2, SUMS), 72, 64 * 4096 * 2, SUMS
    )
    assert step.fixed_s == pytest.approx(1e-3)
    assert step.sharded_s == pytest.approx(8e-3)
    n = 64 * 4096 * 2
    two_shot = 2 * 6e-6 + 2 * 7 / 8 * n / 150e9
    assert step.seconds(8, SUMS) == pytest.approx(1e-3 + 1e-3 + 72 * two_shot)
    assert SUMS.seconds(8, 1024) == pytest.approx(6e-6 + 7 * 1024 / 150e9)  # small: one shot
    assert step.efficiency(1, SUMS) == 1.0
    assert step.efficiency(2, SUMS) > step.efficiency(4, SUMS) > step.efficiency(8, SUMS)
    with pytest.raises(ValueError, match="the model does not hold"):
        Step.from_measured(1e-3, 2e-3, 72, n, SUMS)


def test_the_curve_says_what_was_measured_and_what_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"bytes": n, "kind": "one_shot", "graph_us": 6 + n / 150e3} for n in (2048, 65536, 1 << 20)
    ]
    rows.append({"bytes": 1 << 21, "kind": "one_shot", "error": "it failed"})
    (tmp_path / "all-reduce.json").write_text(json.dumps({"degree": 2, "rows": rows}))
    arguments = [
        "--layers",
        "36",
        "--hidden",
        "4096",
        "--batch",
        "64",
        "--step-ms-1",
        "9",
        "--step-ms-2",
        "5.9",
    ]
    monkeypatch.setattr(
        "sys.argv", ["scaling_model", str(tmp_path / "all-reduce.json"), *arguments]
    )
    scaling_model.main()
    lines = capsys.readouterr().out.splitlines()
    assert "6.0 us + bytes / 150 GB/s" in lines[0]
    assert [line.split("(")[1] for line in lines[2:]] == [
        "measured)",
        "measured)",
        "modelled)",
        "modelled)",
    ]
    assert "9.000 ms" in lines[2]
    assert "5.900 ms" in lines[3]
