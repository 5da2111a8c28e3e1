"""python -m reports render | check | ratio | publish | published | audit | claims | questions | lines | screenshot:
pages, rendered from records.
"""

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.progress import track

from experiments.records.store import RecordError, read_for_report
from experiments.run.help_texts import examples
from reports import text
from reports.analysis.analyse import analyse, ratios
from reports.audit.checks import Outcome, audit
from reports.claims import claims as claims_page
from reports.claims import engines_compared, results_index
from reports.claims import questions as questions_page
from reports.claims.line_counts import CountError, count_lines
from reports.claims.publish import publish as publish_records
from reports.claims.published_studies import PUBLISHED, library
from reports.claims.published_studies import folders as every_folder
from reports.figures.browser import BrowserError, screenshot
from reports.page.evidence import reproduce_command
from reports.page.render import print_table, render, write_markdown

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, as of `python -m experiments`: examples keep their lines
    help="Render reports from records, and everything that is made from published ones.",
    epilog="COMMAND --help shows examples.",
)
KNOWN_ERRORS = (RecordError, CountError, BrowserError)
REPORT = "report"
LINES = PUBLISHED / "code-lines" / "lines.json"
SHOWN = PUBLISHED / "cpu-two-cores" / "ablate"
PICTURE = claims_page.ROOT / "docs" / "report.png"

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "render": (
        ("render reports/published/h200/ablate", "the page of published records"),
        ("render runs/20261129-101500-embedded --out page", "of your own, elsewhere"),
    ),
    "check": (("check", "are all packages here?"),),
    "publish": (("publish runs/20261129-101500-embedded my-machine/embedded", "keep that one"),),
    "ratio": (("ratio reports/published/h200-x2/scaling tp2 vllm-tp2", "on two GPUs each"),),
    "published": (
        ("published", "render all of them again"),
        ("published --check", "only say what is not current"),
    ),
    "audit": (
        ("audit", "everything that is published"),
        ("audit --judge reports/published/h200/ablate", "and its tokens"),
    ),
    "claims": (("claims", "docs/claims.md"),),
    "questions": (("questions", "docs/questions.md"),),
    "lines": (("lines --model ./model --vllm .venv-vllm/bin/python", "count both engines"),),
    "screenshot": (
        ("screenshot", "docs/report.png"),
        ("screenshot page.html --out phone.png --width 390 --dark", "any page, on a phone"),
    ),
}


def epilog(command: str) -> str:
    """The examples of a command, as `python -m experiments` shows its own."""
    return examples("python -m reports", EXAMPLES[command])


CheckOption = Annotated[
    bool,
    typer.Option("--check", help="write nothing; say what is not current, and fail if anything is"),
]


@app.command("render", epilog=epilog("render"))
def render_folder(
    folder: Annotated[Path, typer.Argument(help="holds plan.json and records.jsonl")],
    out: Annotated[
        Path | None, typer.Option(help="where to write; FOLDER/report if not given")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="print every row, legend and note")
    ] = False,
) -> None:
    """Write report.md, report.html, figures/ and analysis.json from the records of FOLDER, and print
    the answer and its table.
    """

    def work() -> None:
        plan, file = read_for_report(folder)
        analysis = analyse(file.records, plan, file.notes)
        for note in file.notes:
            print(f"note: {note}", file=sys.stderr)
        markdown, html = render(plan, file.records, analysis, out or folder / REPORT)
        (html.parent / "analysis.json").write_text(json.dumps(analysis, indent=1) + "\n")
        print_table(analysis, verbose=verbose)
        if out is None:  # else whoever asked knows
            print(f"\nreport   {html} (and {markdown.name})")

    guarded(work)


@app.command("check", epilog=epilog("check"))
def check_rendering() -> None:
    """Check that reports can be rendered here: all packages are installed, and a figure is drawn."""
    Figure().savefig(io.BytesIO(), format="svg")
    print("reports can be rendered")


@app.command(epilog=epilog("publish"))
def publish(
    folder: Annotated[
        Path, typer.Argument(help="a finished execution, e.g. the newest one under runs/")
    ],
    name: Annotated[
        str,
        typer.Argument(
            help="where it goes under reports/published, e.g. cpu-two-cores/conversation"
        ),
    ],
) -> None:
    """Keep an execution: its plan and records go to reports/published, and every page made from
    there is rendered again.
    """

    def work() -> None:
        target = publish_records(folder, name, reproduce_command(read_for_report(folder)[0]))
        print(f"published: {target}")
        library.cache_clear()
        settle(write_all, False)

    guarded(work)


@app.command("ratio", epilog=epilog("ratio"))
def show_ratio(
    folder: Annotated[Path, typer.Argument(help="holds plan.json and records.jsonl")],
    ours: Annotated[str, typer.Argument(help="a cell of the study")],
    theirs: Annotated[str, typer.Argument(help="another one: what the first is divided by")],
) -> None:
    """Print the throughput of one cell over another's, for a question that the study did not ask
    before it ran.
    """

    def work() -> None:
        plan, file = read_for_report(folder)
        try:
            found = ratios(file.records, plan, ours, theirs)
        except ValueError as error:
            raise RecordError(str(error)) from error
        print(
            f"{ours} / {theirs}, output tokens per second, paired within blocks; asked after the study ran, so no verdict"
        )
        for effect in found:
            what = f"{text.ratio(effect['ratio']):>8}  {text.interval(effect['low'], effect['high']):16}"
            print(f"{effect['workload']:24} {what} {text.count_of(effect['n'], 'block')}")

    guarded(work)


@app.command(epilog=epilog("published"))
def published(check: CheckOption = False) -> None:
    """Render every page that is made from reports/published: each study's report, the claims, the
    questions, the index of results, and the table of comparisons with other engines.
    """
    guarded(lambda: settle(write_all, check))


@app.command("audit", epilog=epilog("audit"))
def audit_folders(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="folders of published records; all of reports/published if not given"),
    ] = None,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge", help="also rescore the tokens that were kept, with HF transformers (minutes)"
        ),
    ] = False,
) -> None:
    """Judge published records again, from scratch: the plan's workloads, each launch, each verdict
    from its figures, the tokens, the page, and the code of the commit. Exit status 1 if anything is
    broken.
    """

    def work() -> None:
        broken = 0
        for folder in folders or every_folder():
            if not folder.is_dir():
                raise RecordError(f"{folder}: there is no such folder")
            print(folder)
            for finding in audit(folder, judge=judge):
                broken += finding.outcome is Outcome.BROKEN
                print(f"  {finding.check:18} {finding.outcome:8} {finding.detail}", flush=True)
        if broken:
            print(f"{text.count_of(broken, 'check')} broken", file=sys.stderr)
            raise typer.Exit(1)

    guarded(work)


@app.command(epilog=epilog("claims"))
def claims(check: CheckOption = False) -> None:
    """Render docs/claims.md: what was claimed, what was measured, the verdicts."""
    guarded(lambda: settle(write_claims, check))


@app.command(epilog=epilog("questions"))
def questions(check: CheckOption = False) -> None:
    """Render docs/questions.md: what an expert asks, answered from the records."""
    guarded(lambda: settle(write_questions, check))


@app.command(epilog=epilog("lines"))
def lines(
    model: Annotated[Path, typer.Option(help="folder of a checkpoint that both engines can run")],
    vllm: Annotated[
        Path | None,
        typer.Option(help="interpreter that has vLLM; without it its last count is kept"),
    ] = None,
    out: Annotated[Path, typer.Option(help="where the record goes")] = LINES,
) -> None:
    """Count code lines of our engine and of vLLM, one way: a record that the claims are rendered
    from.
    """

    def work() -> None:
        before = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else None
        result = count_lines(str(model.resolve()), vllm, before)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(out.read_text(encoding="utf-8"))

    guarded(work)


@app.command("screenshot", epilog=epilog("screenshot"))
def make_screenshot(
    page: Annotated[
        Path | None,
        typer.Argument(help="an HTML page; the report of cpu-two-cores/ablate if not given"),
    ] = None,
    out: Annotated[Path, typer.Option(help="the PNG file")] = PICTURE,
    width: Annotated[int, typer.Option(min=200, help="of the window; 390 is a phone")] = 1000,
    height: Annotated[int, typer.Option(min=200, help="of the window")] = 1500,
    dark: Annotated[bool, typer.Option("--dark", help="the dark theme")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="the page to its end")] = False,
) -> None:
    """Take a picture of a page in a headless Chromium; without options, the README's."""

    def work() -> None:
        if page is not None and not page.is_file():
            raise RecordError(f"{page}: there is no such page; `render FOLDER` writes report.html")
        with tempfile.TemporaryDirectory() as aside:
            shown = page or _rendered(SHOWN, Path(aside))
            out.write_bytes(screenshot(shown, width, height, dark=dark, whole=whole))

    guarded(work)


def _rendered(folder: Path, out: Path) -> Path:
    """The HTML page of published records, which is not committed."""
    plan, file = read_for_report(folder)
    return render(plan, file.records, analyse(file.records, plan, file.notes), out)[1]


def write_all(out: Path) -> None:
    for study in track(library().studies.values(), "rendering", transient=True):
        render(study.plan, study.records, study.analysis, out / relative(study.folder / REPORT))
    write_claims(out)
    write_questions(out)
    results_index.write(out, library())
    engines_compared.write(out, library())


def write_claims(out: Path) -> None:
    judged = [claims_page.judge(claim, library()) for claim in claims_page.read_claims()]
    write_page(
        out / relative(claims_page.PAGE),
        "report.md.j2",
        report=claims_page.document(judged),
        pictures={},
        folder="",
    )


def write_questions(out: Path) -> None:
    write_page(
        out / relative(questions_page.PAGE),
        questions_page.TEMPLATE,
        **questions_page.values(library()),
    )


def write_page(path: Path, template: str, **values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_markdown(path, template, **values)


def relative(path: Path) -> Path:
    return path.relative_to(claims_page.ROOT)


def settle(write: Callable[[Path], None], check: bool) -> None:
    """Writes pages into the repository; or, for --check, aside, and compares those that are committed
    (docs/adr/0011-what-is-published.md).
    """
    if not check:
        write(claims_page.ROOT)
        return
    with tempfile.TemporaryDirectory() as aside:
        write(Path(aside))
        fresh = {
            path.relative_to(aside): path.read_bytes()
            for path in Path(aside).rglob("*")
            if path.is_file() and path.suffix != ".html"
        }
    there = {path: claims_page.ROOT / path for path in fresh}
    stale = [
        str(path)
        for path, content in fresh.items()
        if not there[path].is_file() or there[path].read_bytes() != content
    ]
    if stale:
        print(
            "not current: " + ", ".join(stale) + "; render again with: make report", file=sys.stderr
        )
        raise typer.Exit(1)


def guarded(work: Callable[[], object]) -> None:
    """An error that a user can act on ends the program with its message alone."""
    try:
        work()
    except KNOWN_ERRORS as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
