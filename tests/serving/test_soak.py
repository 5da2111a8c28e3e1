"""What `make soak` says of memory: a leak is found, and a few high readings are none."""

from __future__ import annotations

import random

import pytest

from benchmarks import soak

MIB = 2.0**20


def readings(per_hour_mib: float, noise_mib: float = 0.2) -> list[tuple[float, float]]:
    """Of an hour, twice a minute. At first a server fills its caches."""
    rng = random.Random(3)
    found = []
    for n in range(120):
        seconds = 30.0 * n
        filling = min(0.0, n - 20) * 10
        used = 500 + filling + per_hour_mib * seconds / 3600 + rng.gauss(0, noise_mib)
        found.append((seconds, used * MIB))
    return found


def test_a_leak_is_found_with_its_speed() -> None:
    found = soak.growth(readings(40))
    assert found.slope * 3600 / MIB == pytest.approx(40, rel=0.05)
    assert found.low < found.slope < found.high
    assert found.low * 3600 / MIB > 35
    assert found.share > soak.GROWTH


def test_what_fills_at_first_and_a_few_high_readings_are_no_leak() -> None:
    memory = readings(0)
    assert abs(soak.growth(memory).share) < 0.001
    for n in (100, 110, 119):  # a large request is being read
        memory[n] = (memory[n][0], memory[n][1] * 1.5)
    found = soak.growth(memory)
    assert abs(found.share) < 0.002
    assert found.low < 0 < found.high


def test_too_few_readings_say_so() -> None:
    with pytest.raises(ValueError, match="run longer"):
        soak.growth(readings(0)[:7])
