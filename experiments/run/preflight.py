"""Checks before the first launch what could fail after the last one.

Required are a writable output folder with enough disk space and the packages of the gate and the
report. MLflow is a view that can be made later, so its problems are only reported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.host.environment import ROOT, for_subprocess
from experiments.records.store import RecordError

TIMEOUT_S = 180.0
"""Of the process that tries report and MLflow; as a rule it takes some five seconds."""
_ASK = """
import importlib.util, io, json, sys
from pathlib import Path
needed = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
if needed:
    sys.exit("the equivalence gate needs " + ", ".join(needed) + ", which this interpreter does not have")
import reports.analysis.analyse, reports.page.render
from matplotlib.figure import Figure
Figure().savefig(io.BytesIO(), format="svg")
from experiments.run import tracking
print("OBJECTION" + json.dumps(tracking.objection(Path(sys.argv[1]))))
"""


def bytes_needed(plan: dict[str, Any]) -> int:
    """A generous estimate of the disk space of a plan's records, tokens, logs and report: published
    records of a launch take 5 to 60 kB.
    """
    tokens = sum(work["num_requests"] for work in plan["workloads"].values())
    return (32 << 20) + len(plan["launches"]) * ((128 << 10) + 256 * tokens)


def check_folder(plan: dict[str, Any], folder: Path) -> None:
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


def check_end(root: Path = ROOT) -> str | None:
    """What MLflow will object to, None if nothing. Raises RecordError where gate or report could
    not be made at all.
    """
    command = [sys.executable, "-c", _ASK, str(root)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=for_subprocess(),
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"MLflow did not answer within {TIMEOUT_S:.0f} s"
    answer = next((line for line in done.stdout.splitlines() if line.startswith("OBJECTION")), None)
    if answer is None:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RecordError(
            f"nothing was measured, as gate or report could not be made afterwards: {last}. `make setup` installs "
            f"what they need; to see it all: {os.path.basename(sys.executable)} -c 'import reports.page.render'"
        )
    objection: str | None = json.loads(answer.removeprefix("OBJECTION"))
    return objection
