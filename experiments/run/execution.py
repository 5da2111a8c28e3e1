"""Executes a plan: launches, gate, prices, report, MLflow.

An execution is a folder under runs/. An interrupted one is found by the hash of its plan and
resumed. The gate and the report run as separate processes: the gate needs torch and transformers,
and `reports` is a layer above this package.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console

from experiments.cluster.executor import EXECUTORS, Options
from experiments.host import environment, provenance
from experiments.records import store
from experiments.records.types import Plan
from experiments.run import preflight, tracking
from experiments.run.progress import ProgressBar
from experiments.study import block_count
from experiments.study.plan_view import MOST_DETECTABLE

RUNS = environment.WORKPLACE / "runs"
UI = "make ui" if environment.IN_REPOSITORY else "mlflow ui --backend-store-uri sqlite:///mlflow.db"
REPORT, FINISHED = "report", "finished"
_FOREIGN_SHARE = 0.1


class ExecutionError(Exception):
    """A step that failed; the message says what to do."""


def interrupted(plan: Plan, console: Console) -> Path | None:
    """The latest unfinished execution of this plan by this code, if any."""
    code = provenance.code_digest()
    for folder in reversed(executions()):
        if (folder / FINISHED).exists():
            continue
        try:
            begun = store.read_plan(folder / store.PLAN)
            if begun["plan_hash"] != plan["plan_hash"]:
                same_study = begun["study"]["name"] == plan["study"]["name"]
                if same_study and begun["profile"]["name"] == plan["profile"]["name"]:
                    say(
                        console,
                        f"not resuming {shown(folder)}: its plan differs (settings, or the speed or free memory measured on "
                        "this machine); starting a new execution",
                        "yellow",
                    )
                continue
        except store.RecordError as error:
            say(console, f"skipping {shown(folder)}: {error}", "yellow")
            continue
        found = store.launches(store.read(folder))
        if all(record["provenance"]["code_digest"] == code for record in found):
            say(
                console,
                f"resume   continuing the interrupted run in {shown(folder)}: {len(found)} launches are recorded",
            )
            return folder
        say(
            console,
            f"not resuming {shown(folder)}: the code has changed since; starting a new execution",
            "yellow",
        )
    return None


def new_folder(plan: Plan) -> Path:
    """The folder of a new execution; it is not created yet."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return RUNS / f"{stamp}-{plan['study']['name']}-{plan['plan_hash'][:8]}"


def new_check_folder() -> Path:
    """The folder of a new check; it is not created yet."""
    return RUNS / f"{datetime.datetime.now(datetime.UTC).strftime('%Y%m%d-%H%M%S')}-check"


def executions() -> list[Path]:
    """All executions under runs/, oldest first."""
    return sorted(path.parent for path in RUNS.glob(f"*/{store.PLAN}"))


def execute(plan: Plan, folder: Path, options: Options, console: Console) -> bool:
    """Runs everything from the launches to MLflow. True if every launch is ok, every output passed
    the gate, and every lossy configuration has a price.

    If the gate cannot run, the report is written all the same before the error is raised.
    """
    preflight.check_folder(plan, folder)
    if objection := preflight.check_end():
        say(console, f"MLflow cannot record this study: {objection}", "yellow")
    if not run_launches(plan, folder, options, console):
        say(
            console,
            f"Stopped at the deadline; finished launches are in {shown(folder)}. Run the same command to resume.",
        )
        return False
    warn_of_neighbours(folder, console)
    try:
        all_pass = run_gate(folder, console)
    except ExecutionError:
        publish(folder, console, options.verbose)
        raise
    all_priced = "price" not in plan or run_pricing(folder, console)
    publish(folder, console, options.verbose)
    (folder / FINISHED).touch()
    return all_ok(folder, console) and all_pass and all_priced


def run_launches(plan: Plan, folder: Path, options: Options, console: Console) -> bool:
    """Runs pending launches, with a progress bar. False if the deadline stopped them."""
    with ProgressBar(plan, console) as progress:
        return EXECUTORS[options.executor](plan, folder, options, progress.listen)


def warn_of_neighbours(folder: Path, console: Console) -> None:
    """Warns if other processes used the CPU during the launches, which widens the intervals."""
    summaries = [
        r["telemetry"]["summary"].get("cpu_foreign", {}) for r in store.counted(store.read(folder))
    ]
    shares = [summary["mean"] for summary in summaries if summary]
    if shares and statistics.mean(shares) > _FOREIGN_SHARE:
        used = f"other processes used {statistics.mean(shares):.0%} of the CPU during the launches"
        say(
            console,
            f"{used}: expect wide intervals, or run again when the machine is idle",
            "yellow",
        )


def all_ok(folder: Path, console: Console) -> bool:
    """Whether all launches are ok. Prints those that failed or are invalid."""
    bad = [r for r in store.launches(store.read(folder)) if r["status"] != "ok"]
    for record in bad:
        say(console, f"{record['status']}: {record['launch']}: {record['reason']}", "red")
    if any(record["status"] == "failed" for record in bad):
        say(
            console,
            f"to retry failed launches, run the same command with --out {shown(folder)}",
            "yellow",
        )
    return not bad


def run_gate(folder: Path, console: Console) -> bool:
    """Judges outputs that have no verdict yet; whether all outputs pass. Raises ExecutionError if
    the gate cannot run.
    """
    say(console, "gate     rescoring the generated tokens with HF transformers")
    return _judge("gate", folder, "--resume")


def run_pricing(folder: Path, console: Console) -> bool:
    """Measures prices that are missing; whether all could be measured. Where one could not, the report
    says so and leaves the speed of that configuration out. Raises ExecutionError.
    """
    say(console, "price    comparing lossy configurations with the unquantized reference")
    return _judge("price", folder, "--resume")


def publish(folder: Path, console: Console, verbose: bool = False) -> None:
    """Writes report and MLflow runs from the records of a folder. MLflow is only a view: its errors
    are printed and ignored.
    """
    render(folder, verbose)
    say(console, "")
    if line := achieved(folder):
        say(console, line)
    say(
        console,
        f"report   {shown(folder / REPORT / 'report.html')} (and report.md; records above it)",
    )
    try:
        run_id, fresh = tracking.import_folder(folder, folder / REPORT)
        table = tracking.link(run_id)
    except tracking.TrackingError as error:
        say(console, f"MLflow   not written: {error}", "yellow")
        say(console, f"         to retry: {environment.COMMAND} import {shown(folder)}", "yellow")
        return
    say(
        console,
        f"MLflow   {'written' if fresh else 'already up to date'}; `{UI}`, then open the table of this run:",
    )
    say(console, f"         {table}")


def achieved(folder: Path) -> str | None:
    """How precise the intervals came out, beside what the noise of the earlier run had promised; None
    without a report or an interval.
    """
    analysis = folder / REPORT / "analysis.json"
    found = store.read_json(analysis).get("precision") if analysis.is_file() else None
    if not found:
        return None
    plan = store.read_plan(folder / store.PLAN)
    said = (
        f"intervals of ± {found['half_width']:.1%}, changes of {found['detectable']:.1%} detectable"
    )
    if (noise := block_count.previous_noise(plan, earlier(folder))) is None:
        return f"power    {said}"
    blocks, alpha = plan["study"]["design"]["blocks"], plan["study"]["alpha"]
    reach = block_count.half_width(noise[0], blocks, alpha)
    change = block_count.detectable(noise[0], blocks, alpha)
    planned = f"± {reach:.1%}, {change:.1%}" if change < MOST_DETECTABLE else "none"
    return f"power    {said} (planned: {planned})"


def earlier(other_than: Path | None = None) -> list[Path]:
    """Folders of executions, the latest first, then the published ones: where the noise of this
    machine may be known from.
    """
    published = sorted(
        plan.parent for plan in (provenance.ROOT / "reports" / "published").rglob(store.PLAN)
    )
    folders = [*reversed(executions()), *published]
    return [f for f in folders if other_than is None or f.resolve() != other_than.resolve()]


def render(folder: Path, verbose: bool = False) -> None:
    """Writes folder/report and prints its answer and table. Raises ExecutionError."""
    command = [
        sys.executable,
        "-m",
        "reports",
        "render",
        str(folder),
        "--out",
        str(folder / REPORT),
        *(["--verbose"] if verbose else []),
    ]
    if _run(command) != 0:
        raise ExecutionError(
            f"the report could not be rendered; see the message above. The records are in {shown(folder)}; "
            f"to retry: {environment.COMMAND} report {shown(folder)}"
        )


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints one line without wrapping it or interpreting markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def shown(path: Path) -> str:
    """A path relative to the working directory if it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _judge(module: Literal["gate", "price"], folder: Path, option: str) -> bool:
    command = [
        sys.executable,
        "-m",
        f"experiments.{module}",
        "--plan",
        str(folder / store.PLAN),
        "--out",
        str(folder),
        option,
    ]
    status = _run(command)
    if status not in (0, 1):
        message = f"experiments.{module} exited with status {status}; see its message above. The records are in {shown(folder)}."
        raise ExecutionError(message)
    return status == 0


def _run(command: list[str]) -> int:
    return subprocess.run(command, env=environment.for_subprocess(), check=False).returncode
