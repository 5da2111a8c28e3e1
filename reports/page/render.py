"""Rendering a report: Markdown with figures beside it, and one self-contained HTML page.

The same records give the same bytes: nothing is dated, sampled or ordered by chance here, and the
versions that draw are pinned by constraints.txt.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from experiments.look import html_environment, markdown_environment
from experiments.records.types import Plan
from reports import text
from reports.analysis.gate_and_launches import same_tokens
from reports.analysis.types import Analysis
from reports.figures import pictures, svg
from reports.figures.layout import NARROW, WIDE
from reports.page.document import VERDICT_WORDS, Document
from reports.page.evidence import evidence
from reports.page.load_sections import energy_section, load_folded, load_head
from reports.page.model_sections import modelled
from reports.page.overview import machine, overview, subtitle
from reports.page.price_section import price_folded, price_head
from reports.page.sections import results
from reports.page.table import print_table

__all__ = ["document", "print_table", "render"]

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
MARKDOWN, HTML, FIGURES = "report.md", "report.html", "figures"


def render(
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    analysis: Analysis,
    out_dir: Path,
) -> tuple[Path, Path]:
    """Write `report.md`, `report.html` and `figures/*.svg` into out_dir; returns the paths of the
    first two.
    """
    analysis = text.printable(analysis)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / FIGURES).mkdir(exist_ok=True)
    for stale in (out_dir / FIGURES).glob("*.svg"):
        stale.unlink()
    report = document(text.printable(plan), records, analysis)
    inline, files = {}, {}
    for picture in pictures.pictures(analysis):
        wide, narrow = (
            svg.to_svg(pictures.draw(picture, analysis, width)) for width in (WIDE, NARROW)
        )
        inline[picture.name] = Markup(
            svg.inline(wide, f"{picture.name}-wide", picture.title, picture.description, "wide")
            + svg.inline(
                narrow, f"{picture.name}-narrow", picture.title, picture.description, "narrow"
            )
        )
        files[picture.name] = picture
        (out_dir / FIGURES / f"{picture.name}.svg").write_text(
            svg.standalone(wide, picture.title, picture.description), encoding="utf-8"
        )
    html = (
        html_environment(TEMPLATES)
        .get_template("report.html.j2")
        .render(
            report=report,
            pictures=inline,
            verdicts=VERDICT_WORDS,
        )
    )
    (out_dir / HTML).write_text(html, encoding="utf-8")
    write_markdown(
        out_dir / MARKDOWN, "report.md.j2", report=report, pictures=files, folder=FIGURES
    )
    return out_dir / MARKDOWN, out_dir / HTML


def write_markdown(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template; printed values are escaped, runs of blank lines collapsed."""
    page = markdown_environment(TEMPLATES).get_template(template).render(**values)
    path.write_text(re.sub(r"\n{3,}", "\n\n", page), encoding="utf-8")


def document(plan: Plan, records: Sequence[Mapping[str, Any]], analysis: Analysis) -> Document:
    """The report as data."""
    study, counts, gate = plan["study"], analysis["counts"], analysis["gate"]
    arms = [
        effect
        for effect in analysis["effects"]
        if effect["role"] == "aa" and effect["metric"] == analysis["metric"]["key"]
    ]
    model = plan["model"]
    noise = [
        f"{text.ratio(arm['ratio'])} ({text.interval(arm['low'], arm['high'])}) on {arm['workload']}"
        for arm in arms
        if arm["n"] and arm["workload"] in analysis["workloads"]
    ]
    facts = [
        ("machine", machine(analysis)),
        ("date", _dates(analysis)),
        ("model", f"{model['preset'] or model['path']}, {model['dtype']}"),
        (
            "launches",
            f"{counts['counted_launches']} counted, {counts['excluded_launches']} excluded; "
            f"{counts['complete_blocks']} of {text.count_of(counts['planned_blocks'], 'block')} complete",
        ),
        (
            "gate",
            f"{_passed(gate)}. "
            + "; ".join(f"{name}: {same_tokens(analysis, name)}" for name in gate["same_tokens"]),
        ),
        ("A/A twin (noise)", "; ".join(noise) or "none"),
        *([("precision", _precision(analysis))] if analysis["precision"] else ()),
    ]
    if analysis["unjudged"]:
        finished = sum(row["status"] == "ok" for row in analysis["excluded"])
        facts[3:] = [
            (
                "launches",
                f"{finished} run to the end of {counts['planned_launches']}, none counted; "
                f"{counts['run_blocks']} of {text.count_of(counts['planned_blocks'], 'block')} run to the end",
            ),
            ("gate", "not judged: descriptive"),
        ]
    digest = hashlib.sha256(
        json.dumps(list(records), sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    return Document(
        eyebrow=f"study {study['name']}",
        title=study.get("title") or study["name"],
        question=study["question"],
        subtitle=subtitle(analysis),
        answers=[(part["sentence"], part["verdict"]) for part in analysis["answer"]["by_workload"]],
        output=analysis["answer"]["output"],
        output_verdict=_output_verdict(analysis),
        caveats=analysis["answer"]["caveats"],
        facts=facts,
        head=[*price_head(analysis), *overview(plan, analysis), *load_head(analysis)],
        evidence="Statistics, the evidence that the results hold, and how to reproduce them.",
        folded=[
            *(
                ()
                if analysis["unjudged"]
                else (
                    *price_folded(analysis),
                    *load_folded(analysis),
                    *results(analysis),
                    *energy_section(analysis),
                    *modelled(analysis),
                )
            ),
            *evidence(plan, analysis, digest),
        ],
    )


def _output_verdict(analysis: Analysis) -> str:
    """The verdict in whose colour the page says whether the output is the same."""
    gate = analysis["gate"]
    if not gate["rows"]:
        return "inconclusive"
    return "equivalent" if gate["passed"] == len(gate["rows"]) else "slower"


def _passed(gate: Mapping[str, Any]) -> str:
    """How many outputs passed; the same output of several launches is judged once."""
    outputs = text.count_of(len(gate["rows"]), "distinct output")
    if gate["rows"] and gate["passed"] == len(gate["rows"]):
        return f"{outputs}, {'all ' * (len(gate['rows']) > 1)}passed"
    return f"{gate['passed']} of {outputs} passed"


def _precision(analysis: Analysis) -> str:
    """How wide the intervals came out, and what they could have shown."""
    found = analysis["precision"]
    assert found is not None
    rule = analysis["rule"]
    return (
        f"{text.percent(rule['confidence'], 0)} intervals of ± {text.percent(found['half_width'])}, and changes of "
        f"{text.percent(found['detectable'])} found in {text.percent(rule['power'], 0)} of cases (medians over "
        f"{text.count_of(found['effects'], 'effect')})"
    )


def _dates(analysis: Analysis) -> str:
    """The day on which the launches ran, or the first and the last."""
    days = analysis["days"]
    return text.ABSENT if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
