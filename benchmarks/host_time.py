"""What CUDA graphs save of the host's time: the claim `cuda-graphs-cpu-overhead`, from the records
of a study.

    PYTHONPATH=src:. python benchmarks/host_time.py runs/FOLDER --workload canonical --cell no-cuda-graphs --against baseline

Host time is what a step takes of the host beside waiting for the device: (sum of the steps'
durations - device_wait_s) / steps. It plans, launches and commits in it. CPU seconds are no
measure: a host that waits for a GPU spins, and is as busy as one that works. The share saved is 1 -
host time with graphs / host time without, both in the same block; Student's t over blocks, on
log-ratios.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records import store
from reports.statistics.intervals import t_interval


def host_us_a_step(work: dict[str, Any]) -> float:
    """Microseconds. Raises ValueError for a record without the wait: from a CPU, from ranks, or
    from an older version.
    """
    if work.get("device_wait_s") is None:
        raise ValueError(
            "this record does not say how long the host waited for the device: it needs a GPU and one process"
        )
    return (
        (sum(step[0] for step in work["step_times_s"]) - work["device_wait_s"])
        / len(work["step_times_s"])
        * 1e6
    )


def share_saved(
    launches: list[dict[str, Any]], workload: str, cell: str, against: str, alpha: float = 0.05
) -> dict[str, Any]:
    """The share of the host time of `cell` that `against` saves. Raises ValueError where fewer than two
    blocks hold both.
    """
    found = {
        (r["block"], r["cell"]): host_us_a_step(r["workloads"][workload])
        for r in launches
        if r["cell"] in (cell, against)
    }
    blocks = sorted(block for block, name in found if name == cell and (block, against) in found)
    if len(blocks) < 2:
        raise ValueError(
            f"{len(blocks)} blocks hold both {cell!r} and {against!r}; an interval needs 2 or more"
        )
    logs = np.array([math.log(found[b, against] / found[b, cell]) for b in blocks])
    low, high = t_interval(logs, alpha)
    times = {f"{name}_us": [found[b, name] for b in blocks] for name in (cell, against)}
    saved = {
        "share_saved": 1 - math.exp(logs.mean()),
        "low": 1 - math.exp(float(high)),
        "high": 1 - math.exp(float(low)),
    }
    return {"blocks": len(blocks), **times, **saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", default="canonical")
    parser.add_argument("--cell", default="no-cuda-graphs")
    parser.add_argument("--against", default="baseline")
    args = parser.parse_args()
    launches = store.counted(store.read(args.folder))
    print(json.dumps(share_saved(launches, args.workload, args.cell, args.against), indent=1))


if __name__ == "__main__":
    main()
