"""Checks before the first launch what could fail after the last one.

Required are a writable output folder with enough disk space and the packages of the gate and the
report. MLflow is a view that can be made later, so its problems are only reported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.host.environment import WORKPLACE, for_subprocess
from experiments.records.store import RecordError
from experiments.records.types import Plan

TIMEOUT_S = 180.0
"""Timeout of each process; they usually take some five seconds."""
GATE_PACKAGES = ("torch", "transformers", "safetensors")


def bytes_needed(plan: Plan) -> int:
    """A generous estimate of the disk space of a plan's records, tokens, logs and report: published
    records of a launch take 5 to 60 kB.
    """
    tokens = sum(work["num_requests"] for work in plan["workloads"].values())
    return (32 << 20) + len(plan["launches"]) * ((128 << 10) + 256 * tokens)


def check_folder(plan: Plan, folder: Path) -> None:
    """Raises RecordError if the folder of an execution cannot be created or written, or its disk is
    too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-"):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RecordError(
            f"{folder}: cannot write records there ({error.strerror or error}); give another --out"
        ) from error
    if free < (need := bytes_needed(plan)):
        raise RecordError(
            f"{folder}: the disk has {free / 1e6:.0f} MB free, but records and report may take {need / 1e6:.0f} MB: free "
            "some space, or give --out on another disk"
        )


def check_end(root: Path = WORKPLACE) -> str | None:
    """Why MLflow will not be able to record the study; None if nothing is known to prevent it.
    Raises RecordError if the gate or the report could not run.
    """
    if missing := [name for name in GATE_PACKAGES if importlib.util.find_spec(name) is None]:
        raise RecordError(
            f"nothing was measured, because the gate could not run afterwards: this interpreter lacks {', '.join(missing)}. "
            "`make setup` installs what it needs"
        )
    # two processes at once: each imports for seconds
    with _start("reports", "check") as report, _start(__name__, str(root)) as mlflow:
        _, problem, status = _finish(report)
        if status not in (0, None):
            last = (problem.strip().splitlines() or [f"exit status {status}"])[-1]
            raise RecordError(
                f"nothing was measured, because the report could not be rendered afterwards: {last}. `make setup` installs "
                f"what it needs; to check again: {os.path.basename(sys.executable)} -m reports check"
            )
        answer, problem, status = _finish(mlflow)
    if status != 0:
        return (problem.strip().splitlines() or [f"exit status {status}"])[-1]
    objection: str | None = json.loads(answer.strip().splitlines()[-1])
    return objection


def _start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=for_subprocess(),
    )


def _finish(process: subprocess.Popen[str]) -> tuple[str, str, int | None]:
    """(output, errors, exit status) of a process. After TIMEOUT_S it is killed, with status None: a
    slow machine is no reason to refuse a study.
    """
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", f"no answer within {TIMEOUT_S:.0f} s", None
    return output, errors, process.returncode


def main() -> None:
    """Prints what MLflow objects to, as JSON: `python -m experiments.run.preflight ROOT`."""
    from experiments.run import tracking

    print(json.dumps(tracking.objection(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
