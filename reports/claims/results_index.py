"""docs/results.md: one row for each published study, with its question's answer in a sentence or two.

Made from the records, as every page of results is: `python -m reports published`.
"""

import posixpath
from collections.abc import Iterable
from pathlib import Path

from experiments.host.provenance import ROOT
from reports.claims.published_studies import Library, Study
from reports.claims.short_answers import short_answer

PAGE = ROOT / "docs" / "results.md"
REPORT = "report/report.md"

_HEAD = """\
# All results

Every published study: what was asked, where, when, and the answer in a sentence or two, with 95 %
intervals in brackets. Where a study switches optimizations off, the ratio is what the one named gains:
everything on over everything on without it. The link leads to the full report; beside each report are
the plan and the records that it was made from.
The most important results, with their caveats, are in the [Highlights](highlights.md);
[Reading a report](reading-a-report.md) explains the terms. vLLM has several versions here because
its GPU and CPU builds are separate packages, and because an earlier GPU host had an older one:
[Comparing engines](comparing-engines.md#what-was-found).

This page is made from the records in `reports/published/` by `python -m reports published`.
"""


def page(library: Library) -> str:
    """The page as Markdown. Studies are grouped by machine, the newest first."""
    machines: dict[str, list[Study]] = {}
    for study in library.studies.values():
        machines.setdefault(study.hardware, []).append(study)
    parts = [_HEAD]
    for hardware in sorted(machines):
        parts.append(f"## {hardware}\n\n{table(machines[hardware])}\n")
    return "\n".join(parts)


def table(studies: Iterable[Study]) -> str:
    rows = [
        "| study | date | model | answer |",
        "| --- | --- | --- | --- |",
    ]
    newest_first = sorted(studies, key=lambda study: (day(study), study.name), reverse=True)
    return "\n".join(rows + [row(study) for study in newest_first])


def row(study: Study) -> str:
    model = study.plan["model"]
    name = model["preset"] or posixpath.basename(model["path"] or "")
    link = f"../reports/published/{study.name}/{REPORT}"
    cells = [
        f"[{study.plan['study']['title']}]({link})",
        day(study),
        f"{name}, {model['dtype']}",
        short_answer(study.analysis),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def day(study: Study) -> str:
    """When its first launch began: YYYY-MM-DD."""
    return min(record["started_at"] for record in study.records if record["kind"] == "launch")[:10]


def write(out: Path, library: Library) -> None:
    """Writes docs/results.md below `out`, which stands for the repository's root."""
    path = out / PAGE.relative_to(ROOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(library), encoding="utf-8")
