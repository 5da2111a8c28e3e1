"""The power of the CPU packages, from the energy counters (RAPL) that Linux shows under
/sys/class/powercap. Most systems let only root read them; then there is no power. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class CpuPower:
    """Mean power since the last call, summed over all packages."""

    def __init__(self, root: Path = POWERCAP, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # intel-rapl:0 is a package (on AMD too), intel-rapl:0:1 a part of it
        self._counters = [
            (folder / "energy_uj", _number(folder / "max_energy_range_uj") or 2**32)
            for folder in sorted(root.glob("intel-rapl:*"))
            if folder.name.count(":") == 1
        ]
        self._last = self._read()

    def watts(self) -> float | None:
        """None where the counters cannot be read, and without time since the last call."""
        last, now = self._last, self._read()
        self._last = now
        if last is None or now is None or now[0] <= last[0]:
            return None
        joules = 0.0
        for before, after, (_, most) in zip(last[1], now[1], self._counters, strict=True):
            joules += ((after - before) if after >= before else (after - before + most)) / 1e6
        return joules / (now[0] - last[0])

    def _read(self) -> tuple[float, list[int]] | None:
        values = [_number(file) for file, _ in self._counters]
        if not values or None in values:
            return None
        return self._clock(), [value for value in values if value is not None]


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
