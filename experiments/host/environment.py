"""The environment of all processes that the laboratory starts. Standard library only.

Three kinds of variables can change a result or break a run:

    set        required by our processes, whatever the shell says (SET below)
    removed    meant for something else: variables of a git hook, an interactive interpreter
    recorded   read by an engine or its libraries; listed in each launch's record (provenance._ENVIRONMENT)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nanovllm import host_limits

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `experiments/`: the repository, or `nanovllm_lab/` of an installed wheel."""
IN_REPOSITORY = (ROOT / "src" / "nanovllm").is_dir()
WORKPLACE = ROOT if IN_REPOSITORY else Path.cwd()
"""Where runs, MLflow's database and caches go: the repository, or the working directory of an installed wheel."""
COMMAND = "python -m experiments" if IN_REPOSITORY else "nanovllm"
"""How messages call the command line."""
SET = {
    # a notebook sets its own backend, which other interpreters cannot import
    "MPLBACKEND": "Agg",
    "PYTHONSAFEPATH": "1",  # so that files in the working directory do not shadow modules
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


def for_subprocess(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, updated with `variables`, for a Python process that finds this
    repository's modules first.

    If a container's CPU quota is lower than its number of cores, sets OMP_NUM_THREADS accordingly,
    because libraries only count cores.
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
