"""The power of CPU packages, from counters in files as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.host.cpu_power import CpuPower


def package(root: Path, name: str, energy_uj: int) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    return folder / "energy_uj"


def test_power_is_the_energy_of_all_packages_over_time(tmp_path: Path) -> None:
    first, second = (package(tmp_path, f"intel-rapl:{n}", 0) for n in range(2))
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of the first package
    now = [10.0]
    power = CpuPower(tmp_path, lambda: now[0])
    assert power.watts() is None  # no time has passed
    now[0] = 12.0
    first.write_text("20000000")
    second.write_text("40000000")
    assert power.watts() == pytest.approx(30.0)
    now[0] = 13.0
    first.write_text("10000000")  # the counter began again
    assert power.watts() == pytest.approx(990.0)


def test_without_counters_there_is_no_power(tmp_path: Path) -> None:
    assert CpuPower(tmp_path / "absent").watts() is None
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    assert CpuPower(tmp_path).watts() is None
