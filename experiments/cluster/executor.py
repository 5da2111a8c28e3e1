"""Where blocks run. A block is dispatched as a whole, so that no pair of launches straddles two
machines.

`local` runs them here, one after the other; `ray` on the machines of a Ray cluster, many at a time
(docs/adr/0005-ray.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.cluster.dispatch import Dispatcher
from experiments.cluster.ray_workers import RayWorkers
from experiments.host import provenance
from experiments.launch.runner import Runner
from experiments.records.ledger import Ledger, Listener


@dataclass(frozen=True)
class Options:
    """How a plan is executed. pythons: interpreters by engine. blocks: only these. deadline_s:
    start nothing that ends later.
    ray_address: of a running cluster; see RayWorkers."""

    executor: str = "local"
    pythons: dict[str, str] = field(default_factory=dict)
    blocks: tuple[int, ...] | None = None
    deadline_s: float | None = None
    ray_address: str | None = None


Execute = Callable[[dict[str, Any], Path, Options, Listener], bool]


def run_local(plan: dict[str, Any], out: Path, options: Options, listener: Listener) -> bool:
    """Runs every pending block on this machine, resuming what `out` holds; False if the deadline
    came first.

    Raises RecordError, ModelError.
    """
    deadline = None if options.deadline_s is None else time.monotonic() + options.deadline_s
    with Runner(plan, out, resume=True, pythons=options.pythons, listener=listener) as runner:
        blocks = sorted({entry["block"] for entry in runner.pending(options.blocks)})
        return all(runner.run([block], deadline) for block in blocks)


def run_ray(plan: dict[str, Any], out: Path, options: Options, listener: Listener) -> bool:
    """Runs every unfinished block on a Ray cluster, from its start; False if the deadline came
    first.

    Raises RecordError, WorkerError.
    """
    deadline = None if options.deadline_s is None else time.monotonic() + options.deadline_s
    with Ledger(plan, out, provenance.code_digest(), resume=True, listener=listener) as ledger:
        if not ledger.pending(options.blocks):
            return True
        with RayWorkers(plan, options.ray_address, options.pythons) as workers:
            return Dispatcher(ledger, workers).run(options.blocks, deadline)


EXECUTORS: dict[str, Execute] = {"local": run_local, "ray": run_ray}
