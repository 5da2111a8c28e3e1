"""The environment of every process that the laboratory starts. Standard library only.

Three kinds of variables can change a result or break a run:

    set        what our processes need whatever the shell says (SET below)
    removed    what speaks of something else: git's variables of a hook, an interpreter told to stay open
    recorded   what an engine or its libraries read; each launch's record lists them (provenance._ENVIRONMENT)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nanovllm import host_limits

ROOT = Path(__file__).resolve().parents[2]
"""The repository: the folder that holds `experiments/` and `src/`."""
SET = {
    # a notebook's kernel exports its own, which other interpreters cannot import
    "MPLBACKEND": "Agg",
    "PYTHONSAFEPATH": "1",  # or the working directory's statistics.py would be taken for Python's
    "PYTHONUTF8": "1",  # records and pages are UTF-8 in every locale
}
REMOVED = (
    "PYTHONINSPECT",
    "PYTHONSTARTUP",
    "PYTHONCASEOK",
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_CEILING_DIRECTORIES",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
    "GIT_EXTERNAL_DIFF",
    "GIT_DIFF_OPTS",
)


def of_child(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our own environment, with `variables` over it, for a Python that finds this repository's
    modules first.

    Where a container's quota leaves fewer cores than there are, libraries are told so: they count
    those that there are.
    """
    found = {name: value for name, value in os.environ.items() if name not in REMOVED} | SET
    cores = host_limits.cpu_cores()
    if hasattr(os, "sched_getaffinity") and cores < len(os.sched_getaffinity(0)):
        found.setdefault("OMP_NUM_THREADS", str(cores))
    paths = [
        str(ROOT),
        str(ROOT / "src"),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    return found | dict(variables or {}) | {"PYTHONPATH": os.pathsep.join(paths)}
