"""Memory and cores as this process may use them: in a container that is less than the machine has.
Standard library only.

Limits of a container (docker -m and --cpus, Kubernetes, systemd) are control groups, version 1 or
2, the process's own and every one above it; the libraries show the host's numbers.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def cpu_cores() -> int:
    """Cores that this process may use at once: those it may run on, and no more than its quota of
    time, rounded up.
    """
    cores: float = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for group in _groups():
        limit = _numbers(group / "cpu.max") or _numbers(group / "cpu.cfs_quota_us") + _numbers(
            group / "cpu.cfs_period_us"
        )
        if len(limit) == 2 and min(limit) > 0:
            cores = min(cores, limit[0] / limit[1])
    return max(1, math.ceil(cores))


def memory_within(free: int, total: int) -> tuple[int, int]:
    """(free, total) bytes of the machine, cut to what this process may use of it."""
    for group in _groups():
        limit = _numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")
        used = _numbers(group / "memory.current") or _numbers(group / "memory.usage_in_bytes")
        if limit and used and limit[0] < total:  # without a limit: infinite, or in version 1 2**63
            total = int(limit[0])
            # In use and yet to be had: files in the cache, which the kernel drops before it kills.
            # Version 1 says it twice, once for this group alone.
            cached = re.findall(
                r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE
            )
            free = max(0, min(free, total - int(used[0]) + max(map(int, cached), default=0)))
    return free, total


def _groups() -> Iterator[Path]:
    """Folders of the control groups that hold this process, each with those above it. One that is
    not here (a container sees a part of the tree as the whole) is no loss: its limits then lie in
    the topmost folder.
    """
    for _, controllers, path in (line.split(":", 2) for line in _read(MEMBERSHIP).splitlines()):
        # Version 2 has no names here. Version 1 is mounted by all names of a line, with links by
        # each of them.
        for mount in (
            CGROUPS / name for name in {controllers or "unified", *controllers.split(",")}
        ):
            group = mount / path.lstrip("/")
            yield from (place for place in (group, *group.parents) if place.is_relative_to(mount))


def _read(file: Path) -> str:
    """Its text; "" where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(file: Path) -> list[float]:
    """The numbers in a file of one line, `max` as infinite; not those below 0, which version 1
    writes where there is no limit.
    """
    return [
        math.inf if word == "max" else int(word)
        for word in _read(file).split()
        if word == "max" or word.isdecimal()
    ]
