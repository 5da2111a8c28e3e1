"""The executors of a plan. A block always runs on one machine, because launches are only compared
within a block.

`local` runs blocks on this machine, one after the other; `ray` runs them in parallel on the machines
of a Ray cluster (docs/adr/0005-ray.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.cluster.dispatch import Dispatcher
from experiments.cluster.ray_workers import RayWorkers
from experiments.host import provenance
from experiments.launch.runner import Runner
from experiments.records.ledger import Ledger, Listener
from experiments.records.types import Plan


@dataclass(frozen=True)
class Options:
    """How a plan is executed. pythons: interpreters by engine. blocks: run only these. deadline_s:
    skip launches not expected to finish within this time. ray_address: address of a running
    cluster; see RayWorkers. verbose: print the result in full.
    """

    executor: str = "local"
    pythons: dict[str, str] = field(default_factory=dict)
    blocks: tuple[int, ...] | None = None
    deadline_s: float | None = None
    ray_address: str | None = None
    verbose: bool = False


Execute = Callable[[Plan, Path, Options, Listener], bool]


def run_local(plan: Plan, out: Path, options: Options, listener: Listener) -> bool:
    """Runs pending blocks on this machine, resuming the run in `out`. False if the deadline stopped
    it. Raises RecordError, ModelError.
    """
    deadline = None if options.deadline_s is None else time.monotonic() + options.deadline_s
    with Runner(plan, out, resume=True, pythons=options.pythons, listener=listener) as runner:
        blocks = sorted({entry["block"] for entry in runner.pending(options.blocks)})
        return all(runner.run([block], deadline) for block in blocks)


def run_ray(plan: Plan, out: Path, options: Options, listener: Listener) -> bool:
    """Runs unfinished blocks on a Ray cluster, each from its beginning. False if the deadline stopped
    it. Raises RecordError, WorkerError.
    """
    deadline = None if options.deadline_s is None else time.monotonic() + options.deadline_s
    with Ledger(plan, out, provenance.code_digest(), resume=True, listener=listener) as ledger:
        if not ledger.pending(options.blocks):
            return True
        with RayWorkers(plan, options.ray_address, options.pythons) as workers:
            return Dispatcher(ledger, workers).run(options.blocks, deadline)


EXECUTORS: dict[str, Execute] = {"local": run_local, "ray": run_ray}
