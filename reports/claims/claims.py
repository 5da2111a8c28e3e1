"""docs/claims.md: every published claim beside what was measured here, with a verdict by a fixed
rule.

The rule is in ablations/claims.yaml, the measurement in measurements.py, the records in
reports/published; this puts them side by side and judges, whichever way it falls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from experiments.study import yaml_files
from reports import text
from reports.claims import predictions
from reports.claims.measurements import MEASUREMENTS, Finding
from reports.claims.published_studies import Library
from reports.page.document import Column, Document, Section, Table

ROOT = Path(__file__).resolve().parents[2]
CLAIMS, PAGE = ROOT / "ablations" / "claims.yaml", ROOT / "docs" / "claims.md"
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
INCONCLUSIVE, NOT_TESTABLE = "inconclusive", "not testable here"


class Claim(BaseModel):
    """One entry of ablations/claims.yaml; its head says what each key means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    claim: str
    published: str
    hardware: str | None
    value: float
    quantity: str
    rule: str
    measure: dict[str, Any]
    needs: str
    assumed: str

    @model_validator(mode="after")
    def _known_measure(self) -> "Claim":
        if (kind := self.measure.get("kind")) not in MEASUREMENTS:
            raise ValueError(
                f"measure.kind of {self.id}: {kind!r} is unknown; allowed: {', '.join(MEASUREMENTS)}"
            )
        return self


class Claims(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    claims: list[Claim]


@dataclass(frozen=True)
class Judged:
    """A claim with everything that was found, and the verdict; the verdict rests on `deciding`.

    caveats: what the report of the deciding study tells its readers before they believe it.
    """

    claim: Claim
    findings: Sequence[Finding]
    deciding: Sequence[Finding]
    verdict: str
    caveats: Sequence[str] = ()


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """Raises SpecError naming the file, the key and what is allowed."""
    return yaml_files.load(Claims, path)[0].claims


def judge(claim: Claim, library: Library) -> Judged:
    """A claim with what the published records say about it."""
    parameters = {key: value for key, value in claim.measure.items() if key != "kind"}
    findings = list(MEASUREMENTS[claim.measure["kind"]](library, **parameters))
    candidates = [finding for finding in findings if finding.decides]
    if not candidates:
        return Judged(claim, findings, (), NOT_TESTABLE)
    source = max(candidates, key=lambda finding: (finding.n, finding.when, finding.source)).source
    deciding = [finding for finding in candidates if finding.source == source]
    verdicts = {verdict_of(finding, claim.value) for finding in deciding}
    verdict = next(word for word in (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED) if word in verdicts)
    study = library.studies.get(source)  # else a result in a file of its own
    caveats = study.analysis["answer"]["caveats"] if study else ()
    return Judged(claim, findings, deciding, verdict, caveats)


def verdict_of(finding: Finding, value: float) -> str:
    """The verdict of one figure: the whole interval has to be on one side of the claimed value."""
    if finding.low is None or finding.high is None:
        return INCONCLUSIVE
    return (
        REPRODUCED
        if finding.low >= value
        else NOT_REPRODUCED
        if finding.high < value
        else INCONCLUSIVE
    )


def document(judged: Sequence[Judged]) -> Document:
    """The page as data."""
    tally = {
        word: sum(one.verdict == word for one in judged)
        for word in (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_TESTABLE)
    }
    columns = [
        Column("claim"),
        Column("published"),
        Column("measured", "number"),
        Column("interval", "number"),
        Column("on"),
        Column("verdict", "verdict"),
    ]
    answer = f"Of {text.count_of(len(judged), 'claim')}: "
    answer += ", ".join(f"{n} {word}" for word, n in tally.items()) + "."
    return Document(
        eyebrow="claims",
        title="Published claims, and what is measured here",
        question="Do the published figures of engines of this kind hold under a fair measurement?",
        answers=[(answer, INCONCLUSIVE)],
        caveats=[],
        facts=[],
        head=[
            Section(
                "verdicts",
                "The verdicts",
                [],
                tables=[Table("Claims", columns, [row for one in judged for row in _rows(one)])],
                notes=[
                    "reproduced: the whole interval is at or above the claimed value; not reproduced: all of it is below; "
                    "inconclusive: neither; not testable here: no published record has the figure. Where several figures "
                    "decide, all of them have to reach the claimed value.",
                    "The claims, with their rules and measurements, are in ablations/claims.yaml; a rule that was changed "
                    "after its data had been seen says so there. This page is made from reports/published by: python -m "
                    "reports claims",
                ],
            ),
            predictions.section(),
        ],
        evidence="For each claim: its rule, the figures that decide it, other measurements of the same quantity, and "
        "models. A model is no measurement and decides nothing.",
        folded=[_section(one) for one in judged],
    )


def _rows(one: Judged) -> Iterator[list[str]]:
    claim = one.claim
    if not one.deciding:
        yield [claim.claim, _published(claim), text.ABSENT, text.ABSENT, text.ABSENT, one.verdict]
    for number, finding in enumerate(one.deciding):
        head = [claim.claim, _published(claim)] if number == 0 else ["", ""]
        tail = one.verdict if number == 0 else ""
        yield [
            *head,
            _value(claim, finding.value),
            _interval(claim, finding),
            finding.hardware or text.ABSENT,
            tail,
        ]


def _section(one: Judged) -> Section:
    """A claim in detail: what decides first, then other measurements, then models."""
    claim = one.claim
    lead = [
        f"Published: {_published(claim)}. Measured: {claim.quantity}.",
        f"Rule: {claim.rule}.",
        f"Assumed: {claim.assumed}.",
        f"Verdict: {one.verdict}."
        + ("" if one.deciding else f" No published record has it; it needs {claim.needs}."),
    ]
    if one.caveats:
        lead.append(f"Caveats of {one.deciding[0].source}: {' '.join(one.caveats)}")
    measured = [finding for finding in one.findings if not finding.modelled]
    others = [finding for finding in measured if finding not in one.deciding]
    tables = [
        _found(claim, "What decides", one.deciding, decides=True),
        _found(claim, "Other measurements, which do not decide", others),
        _found(
            claim,
            "Modelled, not measured",
            [finding for finding in one.findings if finding.modelled],
            value="modelled",
        ),
    ]
    return Section(
        claim.id,
        claim.claim[0].upper() + claim.claim[1:],
        lead,
        tables=tables,
        gist=one.verdict,
    )


def _found(
    claim: Claim,
    caption: str,
    findings: Sequence[Finding],
    decides: bool = False,
    value: str = "measured",
) -> Table:
    columns = [
        Column("figure"),
        Column(value, "number"),
        Column("interval", "number"),
        Column("evidence"),
        Column("hardware"),
        Column("records", "code"),
        *([Column("verdict", "verdict")] if decides else []),
    ]
    rows = [
        [
            finding.what,
            _value(claim, finding.value),
            _interval(claim, finding),
            finding.evidence,
            finding.hardware or text.ABSENT,
            finding.source,
            *([verdict_of(finding, claim.value)] if decides else []),
        ]
        for finding in findings
    ]
    return Table(caption, columns, rows)


def _published(claim: Claim) -> str:
    return f"{claim.published} ({claim.hardware})" if claim.hardware else claim.published


def _value(claim: Claim, value: float) -> str:
    """A share as a percentage, a ratio as one; what was claimed tells which it is."""
    return text.percent(value) if claim.value < 1 else text.ratio(value)


def _interval(claim: Claim, finding: Finding) -> str:
    if finding.low is None or finding.high is None:
        return "none"
    if finding.low == finding.high:
        return "exact"
    return f"{_value(claim, finding.low)} to {_value(claim, finding.high)}".replace("×", "")
