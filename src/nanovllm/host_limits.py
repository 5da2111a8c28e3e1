"""Memory and CPU cores that this process may use, which in a container is less than the machine
has. Standard library only.

A container's limits (docker -m and --cpus, Kubernetes, systemd) are control groups, version 1 or 2.
They apply to the process's own group and to every group above it; most libraries report the host's
numbers instead.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def cpu_cores() -> int:
    """Cores that this process may use at once: those in its affinity mask, at most its CPU quota,
    rounded up.
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
    """(free, total) bytes of the machine, reduced to what this process may use."""
    for group in _groups():
        limit = _numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")
        used = _numbers(group / "memory.current") or _numbers(group / "memory.usage_in_bytes")
        if limit and used and limit[0] < total:  # without a limit: infinite, or in version 1 2**63
            total = int(limit[0])
            # Cached files count as used, but the kernel drops them before it kills a process. Version 1
            # reports them twice, once for this group alone.
            cached = re.findall(
                r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE
            )
            free = max(0, min(free, total - int(used[0]) + max(map(int, cached), default=0)))
    return free, total


def _groups() -> Iterator[Path]:
    """Folders of the control groups that hold this process, each followed by the groups above it.

    A folder that does not exist is skipped without loss: a container sees part of the tree as the
    whole, and its limits are then in the topmost folder.
    """
    for _, controllers, path in (line.split(":", 2) for line in _read(MEMBERSHIP).splitlines()):
        # Version 2 names no controllers. Version 1 is mounted under all names of a line, with a link for
        # each of them.
        for mount in (
            CGROUPS / name for name in {controllers or "unified", *controllers.split(",")}
        ):
            group = mount / path.lstrip("/")
            yield from (place for place in (group, *group.parents) if place.is_relative_to(mount))


def _read(file: Path) -> str:
    """The file's text; "" where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(file: Path) -> list[float]:
    """The numbers in a one-line file, `max` as infinity. Negative numbers, which version 1 writes
    where there is no limit, are left out.
    """
    return [
        math.inf if word == "max" else int(word)
        for word in _read(file).split()
        if word == "max" or word.isdecimal()
    ]
