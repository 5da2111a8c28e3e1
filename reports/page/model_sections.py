"""The linear model of a factorial, and what the residuals of a study look like: sections between
the results and the evidence.
"""

from collections.abc import Iterator

from reports import text
from reports.analysis.types import Analysis
from reports.page.document import Column, Section, Table
from reports.page.overview import WORKLOAD, confidence, name, numbers


def modelled(analysis: Analysis) -> Iterator[Section]:
    """The sections on the linear model and its residuals. Omitted unless the design is a two-level
    factorial with enough complete blocks.
    """
    yield from _linear_model(analysis)
    yield from _residuals(analysis)


def _linear_model(analysis: Analysis) -> Iterator[Section]:
    rows = analysis["linear_model"]
    if not rows:
        return
    columns = [
        WORKLOAD,
        Column("effect", "code"),
        *numbers("ratio", f"{confidence(analysis)} interval"),
    ]
    columns += [Column("verdict", "verdict"), *numbers("p (Holm)", "degrees of freedom")]
    table = Table(
        "Linear model",
        columns,
        [
            [
                row["workload"],
                row["terms"][0]
                + "".join(
                    f" - {term[1:]}" if term[0] == "-" else f" + {term}"
                    for term in row["terms"][1:]
                ),
                text.ratio(row["ratio"]),
                text.interval(row["low"], row["high"]),
                text.verdict(row),
                text.probability(row["p_holm"]),
                str(row["df"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    lead = [
        "An ordinary linear model of the logs with block effects. A row with one factor is what it buys on average over all "
        "settings of the others; a pair is how many times more it buys than the product. A sum is what this design cannot tell "
        "apart: one of its terms, or several, have this effect.",
    ]
    yield Section("linear-model", "Linear model of the factorial", lead, None, [table])


def _residuals(analysis: Analysis) -> Iterator[Section]:
    found = analysis["residuals"]
    if not found:
        return
    columns = [
        WORKLOAD,
        *numbers("residuals", "standard deviation", "skewness", "p (normal)", "farthest"),
        Column("where", "code"),
    ]
    rows = [
        [
            workload,
            str(row["n"]),
            text.percent(row["sd"]),
            f"{row['skewness']:.2f}",
            text.probability(row["p_normal"]),
            f"{row['largest']:+.1f} sd",
            f"{name(analysis, row['cell'])}, block {row['block']}",
        ]
        for workload, row in found.items()
    ]
    lead = [
        "Logs of the metric once cells and blocks are taken out, over complete blocks. Intervals stand heavy tails and a skew that "
        "both sides of a ratio share; skew in one side alone costs them coverage (docs/methodology.md). p: Shapiro-Wilk; small "
        "means that normal noise is doubtful.",
    ]
    yield Section(
        "residuals",
        "Does the noise look as the intervals assume?",
        lead,
        None,
        [Table("Residuals", columns, rows)],
    )
