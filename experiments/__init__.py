"""The laboratory: runs studies described in YAML and records what they measure.

In a clone it measures the engine in the src/ folder next to it, even if the interpreter has another
nanovllm installed; in an installed wheel, the engine of that wheel (docs/adr/0013). Its packages
from top to bottom; each imports only from those below it (checked by import-linter):

    __main__     the command line: ablate, compare, check, predict, report, import, chat, list, validate
    checking/    `make check`: every pair of optimization levels, HF and vLLM through the gate
    run/         executes a plan, from preflight checks to report and MLflow
    cluster/     runs blocks on this machine or on the workers of a Ray cluster
    prediction/  what a study would measure on a GPU that is not at hand
    study/       expands studies, profiles and models into plans
    launch/      runs launches: an engine process each, measured while it serves
    gate/        checks outputs: tokens are rescored by HF transformers and judged
    engines/     one adapter per engine
    host/        the machine: telemetry, provenance, locks, environment of subprocesses
    workloads    the requests that every engine serves
    workload_files  those read from a file of JSON lines; prompts/ holds the project's own
    load/        arrivals over time: schedules, the driver, objectives, checks of the delivered load
    records/     plans and records: their types, and append-only JSON lines
    chat         a conversation on the terminal
    look/        what all pages share: colours, style sheet, escaping
    equivalence  the former name of `python -m experiments.gate`
"""

import sys
from pathlib import Path

_ENGINE = str(Path(__file__).resolve().parent.parent / "src")
if Path(_ENGINE).is_dir() and _ENGINE not in sys.path:
    sys.path.insert(0, _ENGINE)
