"""docs/questions.md: what an expert asks of an engine like this, answered with the file that shows
it and the measured figure.

The words are in templates/questions.md.j2. Every figure in them is looked up in the published
records by the functions below, with its interval, its hardware and its folder; what has no record
is called not measured.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.records.types import LaunchRecord
from reports import text
from reports.claims.claims import ROOT, judge, read_claims
from reports.claims.measurements import Finding
from reports.claims.published_studies import Library, Study

PAGE, TEMPLATE = ROOT / "docs" / "questions.md", "questions.md.j2"
NOT_MEASURED = "not measured"


def values(library: Library) -> Mapping[str, Callable[..., str]]:
    """The functions that the template may call."""

    def executions(name: str) -> Iterator[Study]:
        return (study for study in library.studies.values() if study.plan["study"]["name"] == name)

    def effect(study: str, cell: str, workload: str, metric: str | None = None) -> str:
        """A cell against the baseline of its study."""
        return _listed(
            (found, row)
            for found in executions(study)
            for row in found.analysis["effects"]
            if (row["cell"], row["workload"], row["metric"])
            == (cell, workload, metric or found.analysis["metric"]["key"])
        )

    def reference(study: str, cell: str, other: str, workload: str) -> str:
        """A cell against another engine."""
        return _listed(
            (found, row)
            for found in executions(study)
            for row in found.analysis["references"]
            if (row["cell"], row["reference"], row["workload"]) == (cell, other, workload)
        )

    def bound(study: str, cell: str, workload: str) -> str:
        """Throughput of a cell and the share of its roofline bound."""
        return _joined(
            f"{text.number(row['tokens_per_s'])} tok/s, {text.percent(row['share'])} of the bound "
            f"({text.count_of(found.analysis['counts']['complete_blocks'], 'block')}, {_where(found.hardware, found.name)})"
            for found in executions(study)
            for row in found.analysis["ceiling"]
            if (row["cell"], row["workload"]) == (cell, workload) and row["share"] is not None
        )

    def counter(study: str, cell: str, workload: str, name: str) -> str:
        """A counter of a cell's launches, least to most."""
        return _joined(
            f"{text.level_range([min(counts), max(counts)])} ({text.count_of(len(counts), 'launch')}, "
            f"{_where(found.hardware, found.name)})"
            for found in executions(study)
            if workload in found.plan["workloads"]
            and cell in found.plan["cells"]
            and (
                counts := [
                    _count(record, workload, name)
                    for record in found.records
                    if record["kind"] == "launch" and _counts(found, record, cell)
                ]
            )
        )

    def claim(name: str) -> str:
        """The verdict on a claim, and the figures that decide."""
        judged = judge(next(one for one in read_claims() if one.id == name), library)
        return _joined(_figure(finding, judged.claim.value) for finding in judged.deciding)

    def found(name: str, what: str) -> str:
        """The figures of a claim's measurement whose description begins with `what`, deciding or
        not.
        """
        judged = judge(next(one for one in read_claims() if one.id == name), library)
        return _joined(
            _figure(finding, judged.claim.value)
            for finding in judged.findings
            if finding.what.startswith(what)
        )

    def gate() -> str:
        """A summary of what the gate judged in all published records."""
        lines = [study.analysis["gate"] for study in library.studies.values()]
        passed, rows, tokens = (
            sum(one["passed"] for one in lines),
            sum(len(one["rows"]) for one in lines),
            sum(one["tokens_checked"] for one in lines),
        )
        return (
            f"{passed} of {rows} distinct outputs passed, {tokens:,} tokens"
            if rows
            else NOT_MEASURED
        )

    return {one.__name__: one for one in (effect, reference, bound, counter, claim, found, gate)}


def _listed(rows: Iterator[tuple[Study, Mapping[str, Any]]]) -> str:
    return _joined(
        f"{text.ratio(row['ratio'])} ({text.interval(row['low'], row['high'])}, {row['verdict']}, "
        f"{text.count_of(row['n'], 'block')}, {_where(study.hardware, study.name)})"
        for study, row in rows
        if row["n"]
    )


def _joined(parts: Iterator[str]) -> str:
    return "; ".join(parts) or NOT_MEASURED


def _figure(finding: Finding, claimed: float) -> str:
    show = text.percent if claimed < 1 else text.ratio
    if finding.low is None or finding.high is None:
        spread = "no interval"
    else:
        spread = (
            "exact"
            if finding.low == finding.high
            else f"{show(finding.low)} to {show(finding.high)}".replace("×", "")
        )
    return f"{finding.what}: {show(finding.value)} ({spread}, {finding.evidence}, {_where(finding.hardware, finding.source)})"


def _where(hardware: str, source: str) -> str:
    return f"{hardware}, records {source}" if hardware else f"records {source}"


def _counts(study: Study, record: LaunchRecord, cell: str) -> bool:
    counted = {row["launch"] for row in study.analysis["order"]["launches"]}
    return record["cell"] == cell and record["launch"] in counted


def _count(record: LaunchRecord, workload: str, name: str) -> int:
    return int(record["workloads"][workload]["counters"].get(name, 0))


def paths(page: Path = PAGE) -> list[str]:
    """The files that the page points to, relative to the repository."""
    words = page.read_text(encoding="utf-8").split("`")[1::2]
    return [word for word in words if "/" in word and " " not in word]
