"""The laboratory: from a study in YAML to records that anybody can judge again.

It is never installed: it measures the engine in src/ beside it, whatever nanovllm the interpreter
has. Its rooms, from the top down; each imports only from those below it (import-linter checks it):

    __main__     the command line: ablate, compare, check, report, import, list, validate
    checking/    `make check`: every pair of switches, HF and vLLM through the gate
    run/         carries a plan out from preflight to report, and shows it in MLflow
    cluster/     where blocks run: on this machine, or on the workers of a Ray cluster
    study/       what is to be run: studies, profiles and models in YAML, expanded to a plan
    launch/      one launch: an engine in a process of its own, measured while it serves
    gate/        is the output right? Tokens are rescored by HF transformers and judged
    engines/     one adapter per engine
    records/     what was measured, as JSON lines that are only appended to
    host/        the machine: telemetry, provenance, locks, environment of child processes
    workloads    the requests that every engine is given
    equivalence  the former name of `python -m experiments.gate`
"""

import sys
from pathlib import Path

_ENGINE = str(Path(__file__).resolve().parent.parent / "src")
if _ENGINE not in sys.path:
    sys.path.insert(0, _ENGINE)
