"""The results of a check: a table on the terminal, check.md, and a self-contained check.html."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.checking.results import CheckResult, Line

COLUMNS = (
    "",
    "job",
    "gate",
    "tokens",
    "mismatches",
    "largest margin",
    "bound",
    "logprob error / bound",
    "identical outputs",
    "note",
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
table{border-collapse:collapse;width:100%;font-size:.86rem}td,th{padding:.3rem .5rem;border-bottom:1px solid #ddd;text-align:left;
vertical-align:top}th{border-bottom:2px solid #888}td.n{text-align:right;font-variant-numeric:tabular-nums}
tr.bad{background:#fde8e6}small{color:#555}@media(prefers-color-scheme:dark){body{background:#161616;color:#e6e6e6}
td,th{border-color:#333}tr.bad{background:#4a1d1a}small{color:#aaa}}
"""


def number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def row(line: Line) -> list[str]:
    """The table row of one verdict, in the order of COLUMNS."""
    gate, logprobs = line["gate"], line.get("logprobs")
    verdict = {"pass": "passes", "fail": "fails", "error": "error"}[line["status"]]
    same = f"{line['identical']} of {line['answers']}" if "identical" in line else ""
    distribution = gate["calibration"].get("distribution") if gate else None
    remark = line["reason"] or (
        f"z = {distribution['z']:.1f}, limit {distribution['z_limit']:.1f}" if distribution else ""
    )
    if line["good"] and line["expected"] == "fail":
        remark = f"as expected: {remark}"
    return [
        "ok" if line["good"] else "NOT OK",
        line["name"],
        verdict,
        *map(
            number,
            (gate["tokens_checked"], gate["mismatches"], gate["max_margin"], gate["bound"])
            if gate
            else (None,) * 4,
        ),
        f"{number(logprobs['engine_error']['max'])} / {number(logprobs['bound']['max'])}"
        if logprobs
        else "",
        same,
        remark,
    ]


def headline(result: CheckResult) -> str:
    lines = result["lines"]
    bad = [line for line in lines if not line["good"]]
    right, broken = (
        [line for line in lines if line["expected"] == kind] for kind in ("pass", "fail")
    )
    if not bad:
        return f"All as expected: {len(right)} configurations and engines pass the gate, {len(broken)} broken ones fail it."
    return f"{len(bad)} of {len(lines)} verdicts are not as expected: " + "; ".join(
        line["name"] for line in bad
    )


def facts(result: CheckResult) -> list[str]:
    """Model, hardware, workloads, noise and skipped configurations; one sentence each."""
    model, work = result["model"], result["workloads"]
    known = [
        f"Model {Path(model['name']).name} (digest {model['digest'][:12]}) on {result['device']}: {result['hardware']}.",
        f"{work['requests']:,} requests in {work['drawn']} workloads drawn by Hypothesis and 3 fixed workloads; "
        f"{result['duration_s']:.0f} s.",
    ]
    for dtype, noise in result["noise"].items():
        error = noise["hf_error"]
        known.append(
            f"{dtype}: HF's own error relative to {noise['reference_dtype']} is {error['q50']:.2g} (median), {error['q999']:.2g} "
            f"(99.9 %), {error['max']:.2g} (maximum) logits over {noise['tokens']:,} tokens; the bound is "
            f"{noise['factor']:g} x {error['max']:.2g} + {noise['floor']:.2g} = {noise['bound']:.2g}."
        )
    return known + [f"Skipped on this machine: {reason}" for reason in result["absent"]]


def markdown(result: CheckResult) -> str:
    def cells(values: list[str]) -> str:
        return (
            "| "
            + " | ".join(value.replace("|", "\\|").replace("\n", " ") for value in values)
            + " |"
        )

    table = [
        cells(list(COLUMNS)),
        cells(["---"] * len(COLUMNS)),
        *(cells(row(line)) for line in result["lines"]),
    ]
    meaning = [
        f"- **{name}**: {group}"
        for name, group in {x["name"]: x["group"] for x in result["lines"]}.items()
    ]
    return "\n".join(
        [
            "# Output check (make check)",
            "",
            f"**{headline(result)}**",
            "",
            *(f"- {fact}" for fact in facts(result)),
            "",
            *table,
            "",
            "## Jobs",
            "",
            *meaning,
            "",
        ]
    )


def page(result: CheckResult) -> str:
    def cell(column: int, value: str) -> str:
        return f"<td{' class=n' if 3 <= column <= 8 else ''}>{html.escape(value)}</td>"

    rows = []
    for line in result["lines"]:
        cells = row(line)
        cells_html = "".join(
            f"<td>{html.escape(value)}<br><small>{html.escape(line['group'])}</small></td>"
            if column == 1
            else cell(column, value)
            for column, value in enumerate(cells)
        )
        rows.append(f"<tr{'' if line['good'] else ' class=bad'}>{cells_html}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    listed = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts(result))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>Output check</title>"
        f"<style>{_STYLE}</style><h1>Output check</h1><p><b>{html.escape(headline(result))}</b></p><ul>{listed}</ul>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></html>\n"
    )


def write(result: CheckResult, folder: Path) -> None:
    (folder / "check.md").write_text(markdown(result))
    (folder / "check.html").write_text(page(result))


def show(result: CheckResult, console: Console) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for index, name in enumerate(COLUMNS[:7]):
        table.add_column(
            name,
            justify="right" if index >= 3 else "left",
            overflow="fold" if index == 1 else "ellipsis",
        )
    for line in result["lines"]:
        table.add_row(*row(line)[:7], style=None if line["good"] else "red")
    console.print(table)
    for line in result["lines"]:
        if not line["good"]:
            console.print(
                f"NOT OK: {line['name']}: {row(line)[-1]}",
                style="red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    console.print(
        headline(result),
        style="green" if result["good"] else "red",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
