"""Locks a machine or its GPUs, so that concurrent measurements do not disturb each other. Standard
library only.

A study on the CPU locks the whole machine; studies on different GPUs may run at the same time. The
locks are files in the system's temporary folder (or $NANOVLLM_LOCKS). The kernel releases them when
their process ends, even if it is killed.
"""

# Own code instead of the package filelock: studies on different GPUs share the machine (LOCK_SH) while one on the CPU has it
# alone (LOCK_EX), and a FileLock is always exclusive. A host that runs launches needs no further package.

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.records.store import RecordError
from experiments.records.types import Config, Plan


@contextlib.contextmanager
def held(plan: Plan, out: Path) -> Iterator[None]:
    """Locks what the plan's launches use, while the context is open. Raises RecordError if another
    runner has locked it.
    """
    with contextlib.ExitStack() as stack:
        if plan["profile"]["device"] == "cpu":
            _lock(stack, "machine", fcntl.LOCK_EX, out)
        else:
            _lock(stack, "machine", fcntl.LOCK_SH, out)
            for gpu in gpus(plan):
                _lock(stack, f"gpu-{gpu}", fcntl.LOCK_EX, out)
        yield


def gpus(plan: Plan) -> list[str]:
    """The GPUs that the launches of a plan use on this machine, named as in CUDA_VISIBLE_DEVICES."""
    number = gpus_needed(plan)
    variables = os.environ | plan["study"]["measurement"]["environment"]
    visible = [
        name.strip()
        for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    return (visible or [str(index) for index in range(number)])[:number]


def gpus_needed(plan: Plan) -> int:
    """The largest number of GPUs that a cell of the plan needs; 0 for a study on the CPU."""
    if plan["profile"]["device"] == "cpu":
        return 0
    return max(
        _parallel(cell["config"], "tensor") * _parallel(cell["config"], "data")
        for cell in plan["cells"].values()
    )


def _parallel(config: Config, kind: str) -> int:
    """The tensor or data parallel size of a cell: one of our engine's optimizations, a plain setting
    of vLLM, and 1 for engines without it.
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
            f"another study is being measured on {what} ({path.read_text().strip() or 'owner unknown'}). Concurrent studies would "
            "slow each other down: wait for it or stop it, then run the same command again."
        ) from error
    # with another user's file or a full disk, the lock works, but has no note
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}, records in {out.absolute()}\n".encode(), 0)


def _open(path: Path) -> int:
    """A file descriptor to lock. Reading is enough for another user's file, on which O_CREAT may be
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
