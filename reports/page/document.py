"""The report as data: sections of words, pictures and tables, which the HTML and the Markdown
template both show.

Everything here is plain text; the templates escape it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# Each verdict that a table may show, and the colour that it is shown in.
VERDICT_WORDS = {
    "faster": "faster",
    "slower": "slower",
    "equivalent": "equivalent",
    "inconclusive": "inconclusive",
    "suggestive: faster": "inconclusive",
    "suggestive: slower": "inconclusive",
    "suggestive: help each other": "inconclusive",
    "suggestive: stand in each other's way": "inconclusive",
    "help each other": "faster",
    "stand in each other's way": "slower",
    "independent": "equivalent",
    "pass": "faster",
    "fail": "slower",
    "error": "slower",
    "within margin": "faster",
    "outside": "slower",
    "undecided": "inconclusive",
    "caught": "faster",
    "not caught": "slower",
}


@dataclass(frozen=True)
class Column:
    """A heading; numbers are set flush right."""

    title: str
    # long: code that may be broken anywhere
    kind: Literal["text", "number", "code", "long", "verdict"] = "text"


@dataclass(frozen=True)
class Table:
    """Rows of text, one for each column. A table without rows is not shown; what its absence means
    is said in words.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    grouped: bool = False  # the first column may be shown as headings between the rows
    folded: bool = False  # behind its caption until asked for, where the medium can

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.caption!r}: a row of {len(row)} for {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Section:
    """One question that a reader has, in the order in which readers have them.

    lead: before picture and tables; notes: after them. gist: the answer in a few words, beside the
    title of a folded section.
    """

    key: str
    title: str
    lead: Sequence[str] = ()
    picture: str | None = None  # name of the figure (figures.pictures)
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, str]] = ()  # (what it does, command)
    notes: Sequence[str] = ()
    gist: str = ""


@dataclass(frozen=True)
class Document:
    """A whole report.

    subtitle: machine, model and date, then a line for each workload. answers: (sentence, verdict), one
    for each workload. output: whether the output is the same, and the verdict whose colour it has.
    head: what everybody reads. folded: the
    evidence, each section behind its title; `evidence` says what that is.
    """

    eyebrow: str
    title: str
    question: str
    answers: Sequence[tuple[str, str]]
    caveats: Sequence[str]
    facts: Sequence[tuple[str, str]]
    head: Sequence[Section] = ()
    subtitle: Sequence[str] = ()
    output: str = ""
    output_verdict: str = "inconclusive"
    evidence: str = ""
    folded: Sequence[Section] = field(default_factory=list)
