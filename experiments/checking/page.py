"""The results of a check: a table on the terminal, check.md, and a self-contained check.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.checking.results import CheckResult, Line
from experiments.look import html_environment, markdown_environment

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
NUMBERS = range(3, 9)
"""The columns of numbers, which are aligned to the right."""
_TEMPLATES = Path(__file__).resolve().parent


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
    return markdown_environment(_TEMPLATES).get_template("check.md.j2").render(_values(result))


def page(result: CheckResult) -> str:
    return html_environment(_TEMPLATES).get_template("check.html.j2").render(_values(result))


def _values(result: CheckResult) -> dict[str, Any]:
    """What both templates show."""
    return {
        "good": result["good"],
        "headline": headline(result),
        "facts": facts(result),
        "columns": COLUMNS,
        "numbers": NUMBERS,
        "rows": [(line, row(line)) for line in result["lines"]],
        "jobs": {line["name"]: line["group"] for line in result["lines"]},
    }


def write(result: CheckResult, folder: Path) -> None:
    (folder / "check.md").write_text(markdown(result))
    (folder / "check.html").write_text(page(result))


def show(result: CheckResult, console: Console) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for index, name in enumerate(COLUMNS[:7]):
        table.add_column(
            name,
            justify="right" if index in NUMBERS else "left",
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
