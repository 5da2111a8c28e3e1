"""One measurement at a time on a machine, or on a GPU: two at once would slow each other down,
unseen. Standard library only.

A study on the CPU has the machine for itself; studies on different GPUs share it. The locks are
files in the system's folder for temporary files ($NANOVLLM_LOCKS for another one), which the kernel
releases when their process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.records.store import RecordError


@contextlib.contextmanager
def held(plan: dict[str, Any], out: Path) -> Iterator[None]:
    """Holds what the plan's launches use while the context is open. Raises RecordError where
    another runner holds it.
    """
    with contextlib.ExitStack() as stack:
        if plan["profile"]["device"] == "cpu":
            _lock(stack, "machine", fcntl.LOCK_EX, out)
        else:
            _lock(stack, "machine", fcntl.LOCK_SH, out)
            for gpu in gpus(plan):
                _lock(stack, f"gpu-{gpu}", fcntl.LOCK_EX, out)
        yield


def gpus(plan: dict[str, Any]) -> list[str]:
    """The GPUs that the launches of a plan use on this machine, by the names of
    CUDA_VISIBLE_DEVICES.
    """
    number = gpus_needed(plan)
    variables = os.environ | plan["study"]["measurement"]["environment"]
    visible = [
        name.strip()
        for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    return (visible or [str(index) for index in range(number)])[:number]


def gpus_needed(plan: dict[str, Any]) -> int:
    """GPUs that the widest cell of a plan needs; 0 for a study on the CPU."""
    if plan["profile"]["device"] == "cpu":
        return 0
    return max(
        _parallel(cell["config"], "tensor") * _parallel(cell["config"], "data")
        for cell in plan["cells"].values()
    )


def _parallel(config: dict[str, Any], kind: str) -> int:
    """How many ways a cell is split; our engine has it among its optimizations, vLLM beside the
    rest, some engines not at all.
    """
    name = f"{kind}_parallel_size"
    return int(config.get("optimizations", {}).get(name) or config.get(name) or 1)


def _lock(stack: contextlib.ExitStack, name: str, how: int, out: Path) -> None:
    path = Path(os.environ.get("NANOVLLM_LOCKS") or tempfile.gettempdir()) / f"nanovllm-{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        what = (
            "this machine"
            if name == "machine"
            else f"GPU {name.removeprefix('gpu-')} of this machine"
        )
        raise RecordError(
            f"another study is being measured on {what} ({path.read_text().strip() or 'holder unknown'}): two at once would slow "
            "each other down. Wait for it, or stop it, then run the same command again."
        ) from error
    # another user's file, or a full disk: the lock holds, only its note is missing
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}, records in {out.absolute()}\n".encode(), 0)


def _open(path: Path) -> int:
    """A descriptor to lock. Another user's file can be read, which is enough; O_CREAT on it may be
    forbidden in /tmp.
    """
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        try:
            return os.open(path, flags, 0o666)
        except (FileNotFoundError, PermissionError) as error:
            problem = error
    raise RecordError(
        f"{path}: cannot be locked ({problem}); set NANOVLLM_LOCKS to a folder that can be written"
    ) from problem
