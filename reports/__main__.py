"""python -m reports render FOLDER: rebuild the report of a study from its plan.json and records.jsonl."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from reports.analysis import analyse
from reports.records import RecordError, read_folder
from reports.render import print_table, render

app = typer.Typer(add_completion=False, help="Reports, rebuilt from records.")


@app.callback()
def main() -> None:
    """Reports, rebuilt from records."""


@app.command("render")
def render_folder(
    folder: Annotated[Path, typer.Argument(help="holds plan.json and records.jsonl")],
    out: Annotated[Path | None, typer.Option(help="where to write; FOLDER/report if not given")] = None,
) -> None:
    """Write report.md, report.html and figures/ from the records of FOLDER, and print the table."""
    try:
        plan, file = read_folder(folder)
    except RecordError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    analysis = analyse(file.records, plan, file.notes)
    for note in file.notes:
        print(f"note: {note}", file=sys.stderr)
    markdown, html = render(plan, file.records, analysis, out or folder / "report")
    print_table(analysis)
    print(f"\nreport: {html}\n        {markdown}")


if __name__ == "__main__":
    app()
