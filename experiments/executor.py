"""Where blocks run. A block is dispatched as a whole, so that no pair of launches straddles two machines.

`local` runs them here, one after the other. An executor for a cluster gives each worker whole blocks of the same plan and a
folder of its own, runs `python -m experiments.launch --plan ... --blocks ... --out ...` there, and carries the folders home:
whatever it is, it is a function with the signature of `run_local`, listed in `EXECUTORS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.launch import Listener, Runner


@dataclass(frozen=True)
class Options:
    """How a plan is executed. pythons: interpreters by engine. blocks: only these. deadline_s: start nothing that ends later."""

    executor: str = "local"
    pythons: dict[str, str] = field(default_factory=dict)
    blocks: tuple[int, ...] | None = None
    deadline_s: float | None = None


Execute = Callable[[dict[str, Any], Path, Options, Listener], bool]


def run_local(plan: dict[str, Any], out: Path, options: Options, listener: Listener) -> bool:
    """Runs every pending block on this machine, resuming what `out` holds; False if the deadline came first.

    Raises RecordError, ModelError.
    """
    deadline = None if options.deadline_s is None else time.monotonic() + options.deadline_s
    with Runner(plan, out, resume=True, pythons=options.pythons, listener=listener) as runner:
        blocks = sorted({entry["block"] for entry in runner.pending(options.blocks)})
        return all(runner.run([block], deadline) for block in blocks)


EXECUTORS: dict[str, Execute] = {"local": run_local}
