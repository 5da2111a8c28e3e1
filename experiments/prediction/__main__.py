"""For the developer of the model: python -m experiments.prediction fit | register | compare | page.

The order matters, and is visible in the history of the repository: `fit` and `register` read no record of
the study that is predicted, only its plan; their files are committed before `compare` is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from experiments.prediction import comparison, page, view
from experiments.prediction.cells import predict
from experiments.prediction.step_time import FITTED, read_fitted
from experiments.records import store

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
PUBLISHED = Path(__file__).resolve().parents[2] / "reports" / "published"
FITTED_MACHINES = ("h200", "h200-x2")


@app.command()
def fit(out: Annotated[Path, typer.Option(help="the coefficients")] = FITTED) -> None:
    """Fit the coefficients to the published records of the H200."""
    from experiments.prediction import fitting  # SciPy takes a second

    folders = {
        f"{machine}/{folder.name}": folder
        for machine in FITTED_MACHINES
        for folder in sorted((PUBLISHED / machine).iterdir())
        if (folder / store.RECORDS).is_file()
    }
    found = fitting.fit_to(folders, out)
    typer.echo(json.dumps({k: v for k, v in found.items() if k != "left_out"}, indent=1))


@app.command()
def register(
    machine: str,
    study: str,
    mixed_replayed: Annotated[
        bool, typer.Option(help="whether that engine replayed mixed steps")
    ] = True,
) -> None:
    """Predict the cells of a published study from its plan alone."""
    plan = store.read_plan(PUBLISHED / machine / study / store.PLAN)
    fitted = read_fitted()
    found, unknown = predict(plan, fitted, splits=None if mixed_replayed else False)
    comparison.REGISTERED.mkdir(exist_ok=True)
    path = comparison.REGISTERED / f"{machine}-{study}.json"
    view.write(path, view.content(plan, found, unknown, fitted))
    typer.echo(f"{len(found)} predictions in {path}; commit them before the records are read")


@app.command()
def compare(machine: str, study: str) -> None:
    """Print a registered prediction beside the records."""
    registered = comparison.REGISTERED / f"{machine}-{study}.json"
    rows = comparison.compare(registered, PUBLISHED / machine / study)
    typer.echo(page.table(rows))
    typer.echo(json.dumps(comparison.summary(rows), indent=1))


@app.command("page")
def page_command() -> None:
    """Write the tables of docs/prediction.md again."""
    page.PAGE.write_text(page.filled(page.PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    app()
