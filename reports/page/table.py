"""The result of a study on the terminal, in 80 columns: speedup, interval, verdict, gate, counters,
and what each of these stands for.
"""

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reports import text
from reports.analysis import names
from reports.analysis.compare import against_engines, throughput_rows
from reports.analysis.types import Analysis, Effect
from reports.page.overview import by_switch, gate, name
from reports.statistics.metrics import THROUGHPUT

COLORS = {
    "faster": "green",
    "slower": "red",
    "equivalent": "blue",
    "suggestive": "yellow",
    "inconclusive": "yellow",
}


def print_table(analysis: Analysis, console: Console | None = None) -> None:
    """Print the answer, a row for each effect on the study's metric, the references, and the
    caveats.
    """
    if console is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # a terminal without UTF-8 shows "?" for "×" instead of a traceback
            sys.stdout.reconfigure(errors="replace")
        console = Console()
    analysis = text.printable(analysis)
    console.print()
    for part in analysis["answer"]["by_workload"]:
        console.print(Text(part["sentence"], style="bold"))
    effects = [
        effect for effect in analysis["effects"] if effect["metric"] == analysis["metric"]["key"]
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    switches = {workload: by_switch(analysis, workload) for workload in analysis["workloads"]}
    of_switches = {
        effect[side] for found in switches.values() for effect, _ in found for side in ("on", "off")
    } - {"all"}
    start = name(analysis, analysis["baseline"])
    title = "off -> on" if any(switches.values()) else f"relative to {start}"
    table.add_column(title, no_wrap=True, max_width=30 if any(switches.values()) else None)
    gain = "speedup" if analysis["metric"]["key"] == THROUGHPUT.key else "ratio"
    table.add_column(gain, justify="right", no_wrap=True)
    table.add_column(
        f"{text.percent(analysis['rule']['confidence'], 0)} interval", justify="right", no_wrap=True
    )
    table.add_column("verdict", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    table.add_column("ran / chances", justify="right")
    for workload in dict.fromkeys(effect["workload"] for effect in effects):
        table.add_row(Text(workload, style="bold"))
        for effect in effects:
            if effect["workload"] == workload and effect["cell"] not in of_switches:
                _add_row(
                    table,
                    analysis,
                    effect,
                    name(analysis, effect["cell"]),
                    _counters(analysis, effect["cell"], workload),
                )
        for added, switch in switches.get(workload, []):
            _add_row(
                table,
                analysis,
                added,
                switch,
                _counters(analysis, added["cell"], workload, added["factor"]),
            )
        pairs = [effect for _, effect in throughput_rows(analysis, analysis["comparisons"])]
        for effect in pairs if against_engines(analysis) else [*pairs, *analysis["references"]]:
            if effect["workload"] == workload:
                theirs = name(analysis, effect["reference"]).removeprefix("reference: ")
                _add_row(table, analysis, effect, f"{name(analysis, effect['cell'])} / {theirs}")
    console.print(table)
    _print_legend(console, analysis, effects, bool(of_switches))
    console.print(Text(_variance(analysis), style="dim"))
    _print_notes(console, analysis)


def _add_row(
    table: Table,
    analysis: Analysis,
    effect: Effect,
    name: str,
    counters: str = "",
) -> None:
    table.add_row(
        Text(f" {name}"),
        text.ratio(effect["ratio"]),
        text.interval(effect["low"], effect["high"], between="–"),
        Text(text.verdict(effect), style=COLORS[text.verdict(effect)]),
        Text(gate(analysis, [effect["cell"]], effect["workload"])),
        counters,
    )


def _counters(analysis: Analysis, cell: str, workload: str, factor: str | None = None) -> str:
    """How often a factor ran and could have run, or the one factor that a cell has on; the report
    lists those of cells with several.
    """
    rows = [
        row
        for row in analysis["toggles"]["rows"]
        if row["cell"] == cell and row["workload"] == workload
    ]
    rows = [row for row in rows if factor in (None, row["factor"])]
    if len(rows) != 1:
        return ""
    engaged, opportunity = (
        max(bounds) if bounds else None for bounds in (rows[0]["engaged"], rows[0]["opportunity"])
    )
    return f"{text.number(engaged)} / {text.number(opportunity)}"


def _variance(analysis: Analysis) -> str:
    """Which variance the intervals rest on, with its degrees of freedom."""
    effects = [
        effect for effect in analysis["effects"] if effect["metric"] == analysis["metric"]["key"]
    ]
    found = sorted({effect.get("df", effect["n"] - 1.0) for effect in effects if effect["n"] > 1})
    if not found:
        return "no intervals: fewer than two blocks"
    freedom = " to ".join(dict.fromkeys(f"{df:.3g}" for df in (found[0], found[-1])))
    freedom += " degree of freedom" if freedom == "1" else " degrees of freedom"
    estimated = {
        prior["workload"]: "∞" if prior["d0"] is None else f"{prior['d0']:.3g}"
        for prior in analysis["statistics"]["priors"]
        if prior["metric"] == analysis["metric"]["key"] and prior["shared"] == analysis["baseline"]
    }
    if not estimated:
        return f"variance: each effect's own, {freedom}"
    d0 = ", ".join(f"{workload} {value}" for workload, value in estimated.items())
    return f"variance: moderated by all effects, {freedom}; d0 as estimated: {d0}"


def _print_legend(
    console: Console,
    analysis: Analysis,
    effects: Sequence[Effect],
    switches: bool,
) -> None:
    """What the names, the verdicts and the counters of the table stand for."""
    start = analysis["baseline"]
    lines = [f"{name(analysis, start)}: {names.settings(analysis, start)}"]
    for cell, entry in analysis["cells"].items():
        if entry["role"] == "all" and cell != start:
            lines.append(f"{name(analysis, cell)}: {', '.join(names.changes(analysis, cell))}")
        if entry["role"] == "aa":
            lines.append(
                f"{name(analysis, cell)}: {name(analysis, start)} run a second time; what it shows is noise"
            )
    lines += names.on_both_sides(analysis) if switches else names.left_out_together(analysis)
    if switches:
        lines.append("alone: switched on over all off; added last: all on over all on without it")
    if any(text.verdict(effect) == "suggestive" for effect in effects):
        lines.append(
            "suggestive: the interval excludes 1, but not significant once corrected for the number of tests"
        )
    lines.append(
        "gate: were the timed outputs right?  ran / chances: how often it ran / could have (most)"
    )
    for line in lines:
        console.print(Text(line, style="dim"))


def _print_notes(console: Console, analysis: Analysis) -> None:
    notes: Sequence[str] = analysis["answer"]["caveats"]
    for note in notes:
        console.print(Text(f"! {note}", style="yellow"))
    for reason, what in names.not_applicable(analysis):
        console.print(Text(f"not applicable: {', '.join(what)}: {reason}"))
