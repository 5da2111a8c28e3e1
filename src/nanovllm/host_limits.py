"""Memory, cores and GPUs as this process may use them: in a container that is less than the machine has. Standard library only.

Limits of a container (docker -m and --cpus, Kubernetes, systemd) are control groups, version 1 or 2, the process's own and every
one above it; the libraries show the host's numbers.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def cpu_cores() -> int:
    """Cores that this process may use at once: those it may run on, and no more than its quota of time, rounded up."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        limit = _numbers(group / "cpu.max") or _numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us")
        if len(limit) == 2 and min(limit) > 0:  # version 1 writes -1 where there is no quota
            cores = min(cores, limit[0] / limit[1])
    return max(1, math.ceil(cores))


def memory_within(free: int, total: int) -> tuple[int, int]:
    """(free, total) bytes of the machine, cut to what this process may use of it."""
    for group in _groups("memory"):
        limit = _numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")
        used = _numbers(group / "memory.current") or _numbers(group / "memory.usage_in_bytes")
        if limit and used and limit[0] < total:  # without a limit: infinite, or in version 1 2**63
            total = int(limit[0])
            free = max(0, min(free, total - int(used[0]) + _reclaimable(group / "memory.stat")))
    return free, total


def visible_gpus(uuids: Sequence[str]) -> list[str]:
    """Of a machine's GPUs, given by UUID, those that CUDA shows this process, by the names of CUDA_VISIBLE_DEVICES.

    As CUDA reads the variable: the list ends at the first name that is no GPU. A MIG instance counts as one GPU.
    """
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return [str(index) for index in range(len(uuids))]
    found: list[str] = []
    for name in map(str.strip, named.split(",")):
        is_index = name.isdecimal() and int(name) < len(uuids)
        is_uuid = name.startswith("MIG-") or (name.startswith("GPU-") and any(uuid.startswith(name) for uuid in uuids))
        if not (is_index or is_uuid) or name in found:
            break
        found.append(name)
    return found


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that hold this process, each with those above it. One that is not here (a container sees
    a part of the tree as the whole) is no loss: its limits then lie in the topmost folder."""
    lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        for mount in {CGROUPS / controllers, CGROUPS / (controller if controllers else "unified")}:
            group = mount / path.lstrip("/")
            yield from (place for place in (group, *group.parents) if place.is_relative_to(mount))


def _numbers(file: Path) -> list[float]:
    """The numbers in a file of one line, `max` as infinite; [] where it cannot be read."""
    try:
        return [math.inf if word == "max" else float(word) for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        return []


def _reclaimable(file: Path) -> int:
    """Bytes of cached files that the kernel drops before it kills: in use, and yet to be had."""
    try:
        entries = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
        return int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0
