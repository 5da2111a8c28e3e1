"""The result of a study on the terminal: the answer, one table, and what to know, on one screen of 80
columns and about 40 lines; everything with `verbose`.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reports import text
from reports.analysis import names
from reports.analysis.answer import added_last
from reports.analysis.compare import against_engines, throughput_rows
from reports.analysis.types import Analysis, Effect
from reports.page.load_sections import latency_summary
from reports.page.overview import gate, name, subtitle, uncorrected
from reports.statistics.intervals import measured_ratio
from reports.statistics.metrics import GOODPUT, THROUGHPUT
from reports.switches import by_switch

COLORS = {"faster": "green", "slower": "red", "equivalent": "blue"}
MOST_ROWS = 12
"""Rows of a short table, as long as no more are decided or named by the answer. The rest is in the page,
and shown by --verbose.
"""


@dataclass(frozen=True)
class _Row:
    """A line of the table. did: what the one optimization that it switches on did in a launch."""

    workload: str
    name: str
    effect: Effect
    did: str = ""
    role: str = ""


def print_table(
    analysis: Analysis, console: Console | None = None, *, verbose: bool = False
) -> None:
    """Print the answer, a row for each effect on the study's metric, and the caveats. Without
    `verbose`: a line or two for each workload, and of the undecided rows no more than fit a screen.
    """
    if console is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # a terminal without UTF-8 shows "?" for "×" instead of a traceback
            sys.stdout.reconfigure(errors="replace")
        console = Console()
    analysis = text.printable(analysis)
    console.print()
    for line in subtitle(analysis):
        console.print(Text(line, style="dim"))
    console.print()
    if verbose:
        for part in analysis["answer"]["by_workload"]:
            console.print(Text(part["sentence"], style="bold"))
    else:
        for line in answer_lines(analysis):
            console.print(Text(line, style="bold"))
    console.print(Text(analysis["answer"]["output"], style="bold"))
    if (found := latency_summary(analysis)) is not None:
        console.print()
        console.print(_latencies(*found))
        if "*" in str(found):
            console.print(Text("* too few samples to claim this percentile, see the page", "dim"))
    rows = list(_rows(analysis, verbose=True))
    shown = rows if verbose else _fitting(analysis, list(_rows(analysis, verbose=False)))
    beside = [row for row in shown if "reference" in row.effect]
    own = [row for row in shown if "reference" not in row.effect]
    for table in (beside and _beside(analysis, beside), own and _table(analysis, own, verbose)):
        if table:
            console.print()
            console.print(table)
    if len(shown) < len(rows):
        left = text.count_of(len(rows) - len(shown), "row")
        console.print(Text(f"and {left} more: --verbose shows all, as does the page", "dim"))
    for line in _legend(analysis, shown, rows, verbose):
        console.print(Text(line, style="dim"))
    if verbose:
        console.print(Text(_variance(analysis), style="dim"))
    _print_notes(console, analysis, verbose)


def answer_lines(analysis: Analysis) -> list[str]:
    """The answer in a few short lines: of each workload everything on, the best single optimization,
    and the largest gains of those that are added last. Of a study without such an answer: its sentences.
    """
    whole = {
        effect["workload"]: effect
        for effect in analysis["effects"]
        if effect["role"] == "all"
        and effect["metric"] == analysis["metric"]["key"]
        and effect["low"] is not None
    }
    if (
        "load" in analysis
        or against_engines(analysis)
        or not set(whole) & set(analysis["workloads"])
    ):
        return [part["sentence"] for part in analysis["answer"]["by_workload"]]
    lines = []
    for workload in analysis["workloads"]:
        if (effect := whole.get(workload)) is None:
            continue
        price = text.price_of(analysis, effect["cell"])
        found = f"all on{price} {text.ratio(effect['ratio'])} {text.verdict(effect)}"
        lines.append(f"{workload}: {found}{_best(analysis, workload)}")
        if gains := added_last(analysis, workload):
            lines.append(f"  added last: {', '.join(gains)}")
        if combined := _together(analysis, effect):
            lines.append(f"  {combined}")
    return lines


def _best(analysis: Analysis, workload: str) -> str:
    """The best optimization by itself, as the end of a line; empty where there is only one change."""
    best = _best_alone(analysis, workload)
    if best is None:
        return ""
    found = f"{name(analysis, best['cell'])} {text.ratio(best['ratio'])} {text.verdict(best)}"
    return f"; best alone {found}"


def _best_alone(analysis: Analysis, workload: str) -> Effect | None:
    metric = analysis["metric"]
    single = [
        effect
        for effect in analysis["effects"]
        if effect["metric"] == metric["key"]
        and effect["workload"] == workload
        and effect["role"] == "treatment"
        and effect["n"]
        and len(names.changes(analysis, effect["cell"])) == 1
    ]
    best = max if metric["better"] == "higher" else min
    return best(single, key=measured_ratio) if single else None


def _together(analysis: Analysis, whole: Effect) -> str:
    """That everything on brings more than its parts, and the counter that shows why; or empty."""
    workload = whole["workload"]
    for row in analysis["combinations"]:
        more = row["leans"] == "help each other" and row["verdict"] != "independent"
        if row["workload"] == workload and more:
            product = measured_ratio(whole) / measured_ratio(row)
            said = f"{text.ratio(row['ratio'])} more than the single speedups multiply to ({text.ratio(product)})"
            why = names.why_together(analysis, workload).partition(" (")[0]
            return f"{said}: {why}" if why else said
    return ""


def _rows(analysis: Analysis, verbose: bool) -> Iterator[_Row]:
    """Every row of the table, workload by workload; of all workloads together only with `verbose`."""
    effects = [
        effect
        for effect in analysis["effects"]
        if effect["metric"] == analysis["metric"]["key"]
        and (verbose or effect["workload"] in analysis["workloads"])
    ]
    compared = against_engines(analysis)
    pairs = [effect for _, effect in throughput_rows(analysis, analysis["comparisons"])]
    switches = {workload: by_switch(analysis, workload) for workload in analysis["workloads"]}
    of_switches = {
        effect[side] for found in switches.values() for effect, _ in found for side in ("on", "off")
    } - {"all"}
    for workload in dict.fromkeys(effect["workload"] for effect in effects):
        for effect in effects:
            if effect["workload"] == workload and effect["cell"] not in of_switches:
                did = _did(analysis, effect["cell"], workload)
                yield _Row(workload, name(analysis, effect["cell"]), effect, did, effect["role"])
        for added, switch in switches.get(workload, []):
            did = _did(analysis, added["cell"], workload, added["factor"])
            yield _Row(workload, switch, added, did, "treatment")
        others = pairs if compared else [*pairs, *(analysis["references"] if verbose else ())]
        for effect in others:
            if effect["workload"] == workload:
                theirs = name(analysis, effect["reference"]).removeprefix("reference: ")
                yield _Row(workload, f"{name(analysis, effect['cell'])} / {theirs}", effect)


def _fitting(analysis: Analysis, rows: Sequence[_Row]) -> list[_Row]:
    """The rows of a short table, in their order: everything on, also beside other engines, the A/A twin,
    whatever is faster or slower, and what the answer names. The others share the rest of MOST_ROWS, each workload in its turn,
    the suggestive ones first.
    """
    best = {
        (workload, effect["cell"])
        for workload in analysis["workloads"]
        if (effect := _best_alone(analysis, workload)) is not None
    }

    def is_kept(row: _Row) -> bool:
        named = (row.workload, row.effect["cell"]) in best
        return (
            row.role in ("aa", "all")
            or "reference" in row.effect
            or row.effect["verdict"] in ("faster", "slower")
            or (named and row.effect.get("kind", "alone") == "alone")
        )

    kept = {i for i, row in enumerate(rows) if is_kept(row)}
    turns: dict[str, int] = {}

    def turn(i: int) -> tuple[bool, int, int]:
        turns[rows[i].workload] = turns.get(rows[i].workload, 0) + 1
        return not text.is_suggestive(rows[i].effect), turns[rows[i].workload], i

    most = MOST_ROWS // 2 if "load" in analysis else MOST_ROWS  # beside its table of latencies
    undecided = [i for i in range(len(rows)) if i not in kept]
    undecided.sort(key=lambda i: not text.is_suggestive(rows[i].effect))
    shared = sorted(undecided, key=turn)
    kept |= set(shared[: max(0, most - len(kept))])
    return [rows[i] for i in sorted(kept)]


def _table(analysis: Analysis, rows: Sequence[_Row], verbose: bool) -> Table:
    """The gate has a column only where not everything passed, as the lines above say so of the rest."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    start = name(analysis, analysis["baseline"])
    split = any(row.effect.get("kind") for row in rows)
    gates = _gates(analysis, rows)
    told = set(gates) - {"pass"}
    with_did = any(row.did for row in rows) and (verbose or not split)
    of = "goodput " if analysis["metric"]["key"] == GOODPUT.key else ""
    table.add_column(
        "off -> on" if split else f"{of}relative to {start}", no_wrap=True, max_width=30
    )
    prices = [text.price_of(analysis, row.effect["cell"]) for row in rows]
    gain = "speedup" if analysis["metric"]["key"] == THROUGHPUT.key else "ratio"
    table.add_column(gain, justify="right", no_wrap=True)
    share = text.percent(analysis["rule"]["confidence"], 0).replace(" ", "")
    table.add_column(f"{share} interval", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if any(prices):
        table.add_column("price", justify="right", no_wrap=True)
    if told:
        table.add_column("gate", no_wrap=True)
    if with_did:
        table.add_column("did")
    workload = ""
    for row, passed, price in zip(rows, gates, prices, strict=True):
        if row.workload != workload:
            workload = row.workload
            table.add_row(Text(workload, style="bold"))
        effect, said = row.effect, text.verdict(row.effect)
        table.add_row(
            Text(f" {row.name.replace(price, '') if price else row.name}"),
            text.ratio(effect["ratio"]),
            text.interval(effect["low"], effect["high"], between="–"),
            Text(said, style=COLORS.get(said, "yellow")),
            *([Text(price.removeprefix(" at "))] if any(prices) else ()),
            *([Text(passed)] if told else ()),
            *([row.did] if with_did else ()),
        )
    return table


def _beside(analysis: Analysis, rows: Sequence[_Row]) -> Table:
    """Ours over another engine, with the throughput of both. A pair whose outputs did not pass the gate
    says so in place of its verdict.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("ours / theirs", overflow="fold", max_width=36)
    table.add_column("tok/s", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    share = text.percent(analysis["rule"]["confidence"], 0).replace(" ", "")
    table.add_column(f"{share} interval", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    rates = {
        (rate["workload"], rate["cell"]): rate["mean"]
        for rate in analysis["rates"]
        if rate["metric"] == THROUGHPUT.key
    }
    workload = ""
    for row, passed in zip(rows, _gates(analysis, rows), strict=True):
        if row.workload != workload:
            workload = row.workload
            table.add_row(Text(workload, style="bold"))
        effect = row.effect
        both = [rates.get((workload, effect[side])) for side in ("cell", "reference")]
        said = text.verdict(effect) if passed == "pass" else f"gate: {passed}"
        table.add_row(
            Text(f" {row.name}"),
            " / ".join(text.number(rate) for rate in both),
            text.ratio(effect["ratio"]),
            text.interval(effect["low"], effect["high"], between="–"),
            Text(said, style=COLORS.get(said, "yellow")),
        )
    return table


def _latencies(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(title, no_wrap=True, max_width=30)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _gates(analysis: Analysis, rows: Sequence[_Row]) -> list[str]:
    """The gate's result for each row. Where all are "pass", the table has no column of it."""
    return [gate(analysis, [row.effect["cell"]], row.workload) for row in rows]


def _did(analysis: Analysis, cell: str, workload: str, factor: str | None = None) -> str:
    """What a factor did, or the one factor that a cell has on; the page lists those of cells with
    several.
    """
    rows = [
        row
        for row in analysis["toggles"]["rows"]
        if row["cell"] == cell and row["workload"] == workload and factor in (None, row["factor"])
    ]
    return names.did_in_short(rows[0]) if len(rows) == 1 else ""


def _legend(
    analysis: Analysis, rows: Sequence[_Row], every: Sequence[_Row], verbose: bool
) -> Iterator[str]:
    """What the words of the table stand for. every: the rows with `verbose`, from which the number of
    tests is taken, so that it is the same in both forms.
    """
    start, effects = analysis["baseline"], [row.effect for row in rows]
    split = any(effect.get("kind") for effect in effects)
    if verbose:
        yield f"{name(analysis, start)}: {names.settings(analysis, start)}"
        for cell, entry in analysis["cells"].items():
            if entry["role"] == "aa":
                yield f"{name(analysis, cell)}: {name(analysis, start)} run a second time; what it shows is noise"
    for cell, entry in analysis["cells"].items():
        if entry["role"] == "all" and cell != start:
            changes = names.changes(analysis, cell)
            yield f"{name(analysis, cell)}: {', '.join(c.removesuffix('=on') for c in changes)}"
    if verbose:
        yield from names.on_both_sides(analysis) if split else names.left_out_together(analysis)
    if split:
        yield "alone: switched on over all off; added last: all on over all on without it"
    if any(text.is_suggestive(effect) for effect in effects):
        own = [row.effect for row in every if row.workload in analysis["workloads"]]
        yield f"suggestive: {uncorrected(own)}"
    if any(row.did for row in rows) and (verbose or not split):
        used = {row.did.rsplit(" ", 1)[-1] for row in rows if row.did}
        yield f"did: {'; '.join(said for unit, said in names.UNITS.items() if unit in used)}"
    if set(_gates(analysis, rows)) - {"pass"}:
        yield "gate: did HF transformers, in a higher precision, confirm the timed tokens?"


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


def _print_notes(console: Console, analysis: Analysis, verbose: bool) -> None:
    notes: Sequence[str] = analysis["answer"]["caveats"]
    for note in notes:
        console.print(Text(f"! {note}", style="yellow"))
    missing = names.not_applicable(analysis)
    for reason, what in missing:
        if verbose:
            console.print(Text(f"not applicable: {', '.join(what)}: {reason}"))
    if missing and not verbose:
        count = sum(len(what) for _, what in missing)
        console.print(
            Text(f"not applicable here: {text.count_of(count, 'level')}, see the page", "dim")
        )
