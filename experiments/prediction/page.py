"""The tables of docs/prediction.md. Its words are written by hand; between `<!-- name -->` and `<!-- end -->`
stands what is computed here, which a test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.prediction import comparison
from experiments.prediction.comparison import Compared, Term
from experiments.prediction.step_time import FITTED, read_fitted

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "prediction.md"
PUBLISHED = ROOT / "reports" / "published"
_BLOCK = re.compile(r"<!-- (table|summary|terms) (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """The page with its computed blocks as the records and the registered predictions have them."""

    def block(match: re.Match[str]) -> str:
        what, name = match.groups()
        if name == "fit":
            body = fit_lines()
        elif what == "terms":
            body = term_lines(comparison.terms(PUBLISHED / name, read_fitted()))
        else:
            machine, study = name.split("/")
            rows = comparison.compare(
                comparison.REGISTERED / f"{machine}-{study}.json", PUBLISHED / machine / study
            )
            body = table(rows) if what == "table" else lines(rows)
        return f"<!-- {what} {name} -->\n{body}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def table(rows: Sequence[Compared]) -> str:
    """One row a cell and workload, in the order given."""
    head = (
        "| workload | configuration | predicted tok/s (90 %) | measured (launches) | error | inside | ratio predicted | "
        "ratio measured | its error | host |\n| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    )
    return "\n".join(
        [
            head,
            *(
                f"| {r.workload} | {r.cell} | {r.predicted:,.0f} ({r.low:,.0f} to {r.high:,.0f}) | {r.measured:,.0f} "
                f"({r.lowest:,.0f} to {r.highest:,.0f}) | {r.error:+.0%} | {'yes' if r.inside else '**no**'} | "
                f"{r.predicted_ratio:.2f} | {r.measured_ratio:.2f} | {r.ratio_error:+.0%} | {r.host_share:.0%} |"
                for r in rows
            ),
        ]
    )


def lines(rows: Sequence[Compared]) -> str:
    """The summary beside what issue and page ask for."""
    s = comparison.summary(rows)
    ranks = ", ".join(f"{name} {value:.2f}" for name, value in sorted(s["rank"].items()))
    return "\n".join(
        [
            "| what | asked for | reached |",
            "| --- | --- | --- |",
            f"| throughput within 10 % | every cell | {s['within_10']:.0%} of {s['cells']} |",
            f"| median error of throughput | 4 % | {s['median_error']:.0%} |",
            f"| largest error of throughput | 10 % | {s['worst_error']:.0%} |",
            f"| ratio to the baseline within 6 % | every cell | {s['ratios_within_6']:.0%} |",
            f"| median error of the ratio | 6 % | {s['median_ratio_error']:.0%} |",
            f"| measured values inside the 90 % interval | 85 to 95 % | {s['inside']:.0%} |",
            f"| median error of TTFT p50, TPOT p50 | 10 % | {s['median_ttft_error']:.0%}, {s['median_tpot_error']:.0%} |",
            f"| rank agreement (Kendall's tau) | | {ranks} |",
        ]
    )


def term_lines(terms: Sequence[Term]) -> str:
    """Predicted over recorded seconds of each kind of step."""
    head = (
        "| steps | decided by | cells | predicted / recorded time, median | least to most |\n"
        "| --- | --- | ---: | ---: | --- |"
    )
    rows = [
        f"| {t.kind} | {'host' if t.host else 'GPU'} | {t.cells} | {t.median:.2f} | {t.least:.2f} to {t.most:.2f} |"
        for t in sorted(terms, key=lambda t: -abs(t.median - 1))
    ]
    return "\n".join([head, *rows])


def fit_lines() -> str:
    """How well the fit describes the studies that it knows, and one that was left out."""
    found = json.loads(FITTED.read_text(encoding="utf-8"))
    by_study: dict[str, list[float]] = {}
    for row in found["left_out"]:
        by_study.setdefault(row["study"], []).append(row["log_error"])
    head = "| study left out | cells | median error | largest | host factor of the full fit |\n| --- | ---: | ---: | ---: | ---: |"
    body = [
        f"| {name} | {len(errors)} | {_median_percent(errors)} | {max(errors, key=abs):+.0%} | "
        f"{found['host_factors'][name]:.2f} |"
        for name, errors in sorted(
            by_study.items(), key=lambda item: -sorted(map(abs, item[1]))[len(item[1]) // 2]
        )
    ]
    return "\n".join([head, *body])


def _median_percent(errors: Sequence[float]) -> str:
    return f"{sorted(map(abs, errors))[len(errors) // 2]:.0%}"
