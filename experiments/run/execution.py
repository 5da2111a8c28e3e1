"""From a plan to its table: launches, gate, report, MLflow; and where all of that lies.

An execution is a folder under runs/. One that was interrupted is found again by the hash of its
plan, and goes on. The gate and the report are processes of their own: the gate needs torch and
transformers and nothing of this program, and the report is a layer above it.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.cluster.executor import EXECUTORS, Options
from experiments.host import environment, provenance
from experiments.records import store
from experiments.run import preflight, tracking
from experiments.run.progress import ProgressBar

RUNS = provenance.ROOT / "runs"
REPORT, FINISHED = "report", "finished"
_FOREIGN_SHARE = 0.1
_RENDER = """
import json, sys
from pathlib import Path
from reports.analysis.analyse import analyse
from reports.analysis.study_records import read_folder
from reports.page.render import print_table, render
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
plan, file = read_folder(folder)
analysis = analyse(file.records, plan, file.notes)
render(plan, file.records, analysis, out)
(out / "analysis.json").write_text(json.dumps(analysis, indent=1) + "\\n")
print_table(analysis)
"""


class ExecutionError(Exception):
    """A step that did not end well; the message says what to do."""


def interrupted(plan: dict[str, Any], console: Console) -> Path | None:
    """The latest execution of this plan by this code that has not been finished; None if there is
    none.
    """
    code = provenance.code_digest()
    for folder in reversed(executions()):
        if (folder / FINISHED).exists():
            continue
        try:
            begun = store.read_plan(folder / store.PLAN)
            if begun["plan_hash"] != plan["plan_hash"]:
                if all(begun[part]["name"] == plan[part]["name"] for part in ("study", "profile")):
                    say(
                        console,
                        f"not going on with {shown(folder)}: it was planned otherwise (settings, or what was measured of "
                        "this machine: speed, free memory); starting again",
                        "yellow",
                    )
                continue
        except store.RecordError as error:
            say(console, f"not looking into {shown(folder)}: {error}", "yellow")
            continue
        found = store.launches(store.read(folder))
        if all(record["provenance"]["code_digest"] == code for record in found):
            say(
                console,
                f"resume   going on with the interrupted run in {shown(folder)}: {len(found)} launches are recorded",
            )
            return folder
        say(
            console,
            f"not going on with {shown(folder)}: the code has changed since; starting again",
            "yellow",
        )
    return None


def new_folder(plan: dict[str, Any]) -> Path:
    """The name of a folder for a new execution."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return RUNS / f"{stamp}-{plan['study']['name']}-{plan['plan_hash'][:8]}"


def new_check_folder() -> Path:
    """The name of a folder for a new check."""
    return RUNS / f"{datetime.datetime.now(datetime.UTC).strftime('%Y%m%d-%H%M%S')}-check"


def executions() -> list[Path]:
    """Every execution under runs/, the oldest first."""
    return sorted(path.parent for path in RUNS.glob(f"*/{store.PLAN}"))


def execute(plan: dict[str, Any], folder: Path, options: Options, console: Console) -> bool:
    """Everything from the launches to MLflow; True if every launch counts and every output passed
    the gate.

    What has been measured ends in a report, also where the gate cannot run; that is raised
    afterwards.
    """
    preflight.check_folder(plan, folder)
    if objection := preflight.check_end():
        say(console, f"MLflow will not show this study: {objection}", "yellow")
    if not run_launches(plan, folder, options, console):
        say(
            console,
            f"The deadline came first. Go on with the same command; finished launches are in {shown(folder)}.",
        )
        return False
    warn_of_neighbours(folder, console)
    try:
        all_pass = run_gate(folder, console)
    except ExecutionError:
        publish(folder, console)
        raise
    publish(folder, console)
    (folder / FINISHED).touch()
    return all_ok(folder, console) and all_pass


def run_launches(plan: dict[str, Any], folder: Path, options: Options, console: Console) -> bool:
    """Runs what is pending, with a progress bar; False if the deadline came first."""
    with ProgressBar(plan, console) as progress:
        return EXECUTORS[options.executor](plan, folder, options, progress.listen)


def warn_of_neighbours(folder: Path, console: Console) -> None:
    """Says so where other processes used the CPU while it was measured: blocks then differ more,
    and intervals are wide.
    """
    summaries = [
        r["telemetry"]["summary"].get("cpu_foreign", {}) for r in store.counted(store.read(folder))
    ]
    shares = [summary["mean"] for summary in summaries if summary]
    if shares and statistics.mean(shares) > _FOREIGN_SHARE:
        used = f"other processes used {statistics.mean(shares):.0%} of the CPU meanwhile"
        say(
            console,
            f"{used}: expect wide intervals, or run it again when the machine is idle",
            "yellow",
        )


def all_ok(folder: Path, console: Console) -> bool:
    """Whether no launch failed or was invalid; those that did are listed."""
    bad = [r for r in store.launches(store.read(folder)) if r["status"] != "ok"]
    for record in bad:
        say(console, f"{record['status']}: {record['launch']}: {record['reason']}", "red")
    if any(record["status"] == "failed" for record in bad):
        say(
            console,
            f"failed launches run again with the same command and --out {shown(folder)}",
            "yellow",
        )
    return not bad


def run_gate(folder: Path, console: Console) -> bool:
    """Judges what has no verdict yet; whether all outputs pass. Raises ExecutionError where the
    gate cannot run.
    """
    say(console, "equivalence gate: rescoring what was generated with HF transformers")
    return _gate(folder, "--resume")


def publish(folder: Path, console: Console) -> None:
    """Report, table and MLflow from the records of a folder. MLflow is a view: what it objects to
    is told and ends nothing.
    """
    render(folder)
    say(console, f"\nreport   {shown(folder / REPORT / 'report.html')} (and report.md)")
    say(console, f"records  {shown(folder)}")
    try:
        run_id, fresh = tracking.import_folder(folder, folder / REPORT)
    except tracking.TrackingError as error:
        say(console, f"MLflow   not written: {error}", "yellow")
        say(console, f"         then: python -m experiments import {shown(folder)}", "yellow")
        return
    say(
        console,
        f"MLflow   run {run_id} {'written' if fresh else 'was there already'}; look at it with `make ui` or `mlflow ui`",
    )


def render(folder: Path) -> None:
    """Writes folder/report and prints its table. Raises ExecutionError."""
    if _run([sys.executable, "-c", _RENDER, str(folder), str(folder / REPORT)]) != 0:
        raise ExecutionError(
            f"the report could not be made; the message is above. Records are in {shown(folder)}; "
            f"once that is mended: python -m experiments report {shown(folder)}"
        )


def say(console: Console, text: str, style: str | None = None) -> None:
    """One line, whatever its length; nothing in it is markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def shown(path: Path) -> str:
    """A path as short as it can be written from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _gate(folder: Path, option: str) -> bool:
    command = [
        sys.executable,
        "-m",
        "experiments.gate",
        "--plan",
        str(folder / store.PLAN),
        "--out",
        str(folder),
        option,
    ]
    status = _run(command)
    if status not in (0, 1):
        message = f"the equivalence gate ended with status {status}; its message is above. Records are in {shown(folder)}."
        raise ExecutionError(message)
    return status == 0


def _run(command: list[str]) -> int:
    return subprocess.run(command, env=environment.of_child(), check=False).returncode
