"""What a report says of its configurations beside their names, which are those of
experiments/records/cell_names.py; and what each optimization did in a launch, in words.

The counters `engaged` and `opportunity` are the engine's (src/nanovllm/toggles/table.py): how often an
optimization ran, and how often that had a use. Their units differ from one optimization to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports import text
from reports.analysis.types import Analysis
from reports.statistics.price import PriceRow, Prices, of
from reports.text import level_range


def settings(analysis: Analysis, cell: str) -> str:
    """The levels of a cell: "prefix_cache=on, batching=chunked"."""
    return ", ".join(
        f"{factor}={level}" for factor, level in analysis["cells"][cell]["levels"].items()
    )


def changes(analysis: Analysis, cell: str) -> list[str]:
    """The settings in which a cell differs from the baseline: ["prefix_cache=on"]."""
    start = analysis["cells"][analysis["baseline"]]["levels"]
    return [
        f"{factor}={level}"
        for factor, level in analysis["cells"][cell]["levels"].items()
        if start.get(factor) != level
    ]


def left_out_together(analysis: Analysis) -> list[str]:
    """A sentence for the cells `all-but-...` that lack more than the toggle in their name, because
    another toggle of everything on needs it.
    """
    cells = analysis["cells"]
    whole = next((entry for entry in cells.values() if entry["role"] == "all"), None)
    everything = (whole or cells[analysis["baseline"]])["levels"]
    found: dict[tuple[str, ...], list[str]] = {}
    for cell, entry in cells.items():
        factor = cell.removeprefix("all-but-")
        lacking = [
            other for other, level in everything.items() if entry["levels"].get(other) != level
        ]
        if factor != cell and factor in lacking and len(lacking) > 1:
            also = tuple(other for other in lacking if other != factor)
            found.setdefault(also, []).append(factor)
    return [
        f"{listed([f'all-but-{factor}' for factor in factors])} "
        f"{'switches' if len(factors) == 1 else 'switch'} {listed(also)} off as well: "
        f"{listed(also)} {'needs' if len(also) == 1 else 'need'} {listed(factors)}."
        for also, factors in found.items()
    ]


def on_both_sides(analysis: Analysis) -> list[str]:
    """A sentence for the rows `added last` and `on top` whose two configurations share more than
    everything on: a toggle that is off in both or on in both, because one needs the other.
    """
    found: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for row in analysis["factors"]:
        if row["kind"] == "left out":
            sides = (("without", row.get("without")), ("beside", row.get("beside")))
            for side, others in sides:
                if others:
                    found.setdefault((side, tuple(others)), {})[row["factor"]] = None
    sentences = []
    for (side, shared), factors in found.items():
        one, it = len(shared) == 1, len(factors) == 1
        if side == "without":
            why = f"{'needs' if one else 'need'} {'it' if it else 'them'}, so {'it is' if one else 'they are'} off"
            sentences.append(
                f"{listed([*factors])}, added last: {listed(shared)} {why} in both configurations."
            )
        else:
            why = f"{'it needs' if it else 'they need'} {listed(shared)}, which {'is' if one else 'are'} on"
            sentences.append(f"{listed([*factors])}, on top: {why} in both configurations.")
    return sentences


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def not_applicable(analysis: Analysis) -> list[tuple[str, list[str]]]:
    """(reason, everything that it keeps from running here): one entry a reason, in the order of the
    plan.
    """
    found: dict[str, list[str]] = {}
    for entry in analysis["not_applicable"]:
        factor, level = str(entry["factor"]), str(entry["level"])
        # A cell of the study's own: its levels stand where a factor has one level.
        what = factor if "=" in level else f"{factor}={level}"
        found.setdefault(str(entry["reason"]), []).append(what)
    return list(found.items())


@dataclass(frozen=True)
class Counts:
    """What the counters of an optimization count.

    ran: `engaged`, a plural; used: `opportunity`; short: the more telling of the two in one or two
    words. saves: `used` is work that was spared, so that the more of it, the better. partner: the
    factor that decides how much can be spared, and why.
    """

    ran: str
    short: str
    used: str = ""
    saves: bool = False
    partner: tuple[str, str] | None = None


COUNTS = {
    "attention_backend": Counts("attention calls", "calls"),
    "kernels": Counts("kernel calls", "calls"),
    "prefix_cache": Counts(
        "lookups",
        "found",
        "prompt tokens found",
        saves=True,
        partner=(
            "batching",
            "static batching looks up a whole batch before any of its prefixes is computed",
        ),
    ),
    "cascade_attention": Counts(
        "steps looked for shared prefixes",
        "shared",
        "attention calls read one once for all",
        saves=True,
    ),
    "batching=continuous": Counts("steps", "joined", "requests joined a running batch"),
    "batching=chunked": Counts("steps", "mixed", "with prefill beside decodes"),
    "cuda_graphs": Counts("graph replays", "replays"),
    "overlap": Counts("steps planned during another", "steps"),
    "tensor_parallel_size": Counts("sums over all ranks", "sums"),
    "all_reduce": Counts("sums in symmetric memory", "sums"),
    "data_parallel_size": Counts("requests served by other replicas", "requests"),
    "quantization": Counts("products with quantized weights", "products"),
    "kv_cache_dtype": Counts("attention calls over such a cache", "calls"),
}
_UNKNOWN = Counts("times", "times", "with something to do")


UNITS = {
    "found": "found: prompt tokens in the cache",
    "shared": "shared: attention calls that read a prefix once for all",
    "joined": "joined: requests that joined a running batch",
    "mixed": "mixed: steps with prefill beside decodes",
    "products": "products: with quantized weights",
    "calls": "calls: of the kernels or the attention",
    "replays": "replays: of CUDA graphs",
    "steps": "steps: planned during another, or run",
    "sums": "sums: over all ranks",
    "requests": "requests: served by other replicas",
    "lookups": "lookups: in the prefix cache",
    "times": "times: how often it ran",
}
"""The units of `did_in_short`, explained."""


def counts_of(factor: str, level: Any) -> Counts:
    """What the counters of a factor at this level count."""
    return COUNTS.get(f"{factor}={level}") or COUNTS.get(factor, _UNKNOWN)


def did(row: Mapping[str, Any]) -> str:
    """What an optimization did, from a row of the analysis's toggles: "120 lookups, 18,560 prompt
    tokens found". The least to the most over launches where they differ.
    """
    counts = counts_of(row["factor"], row["level"])
    said = f"{level_range(row['engaged'])} {counts.ran}"
    if row["opportunity"] is None:
        return said
    idle = row["opportunity"][1] == 0
    none = ": nothing to gain in this workload" if idle else ""
    return f"{said}, {level_range(row['opportunity'])} {counts.used or _UNKNOWN.used}{none}"


def did_in_short(row: Mapping[str, Any]) -> str:
    """The same for a narrow column, the most of all launches: "18,560 found"."""
    counts = counts_of(row["factor"], row["level"])
    if row["opportunity"] is not None:
        return f"{row['opportunity'][1]:,} {counts.short}"
    word = counts.ran.split()[0] if counts.used else counts.short
    return f"{row['engaged'][1]:,} {word}" if row["engaged"] else ""


def why_together(analysis: Analysis, workload: str) -> str:
    """The counter that shows why everything on brings more than its parts: an optimization that spares
    more work in company than alone, with the partner that lets it. Empty where no counter shows it.

    The partner is the one without which, everything else on, the counter is lowest; in a study that
    leaves none out, the one that the optimization is known to depend on (COUNTS).
    """
    cells = analysis["cells"]
    whole = next((cell for cell, entry in cells.items() if entry["role"] == "all"), None)
    if whole is None:
        return ""
    changed = dict(change.split("=", 1) for change in changes(analysis, whole))
    spared = {
        (row["cell"], row["factor"]): row["opportunity"][1]
        for row in analysis["toggles"]["rows"]
        if row["workload"] == workload and row["opportunity"] is not None
    }
    best: tuple[float, str] = (_MUCH_MORE, "")
    for factor, level in changed.items():
        counts, alone = counts_of(factor, level), f"{factor}={level}"
        single = next(
            (cell for cell in cells if changes(analysis, cell) == [alone]),
            None,
        )
        here, before = spared.get((whole, factor)), spared.get((single or "", factor))
        if not counts.saves or here is None or before is None or here < best[0] * max(before, 1):
            continue
        partner, why = _partner(analysis, whole, changed, factor, spared)
        beside = f" beside {partner}={changed[partner]}" if partner else " with everything on"
        best = (
            here / max(before, 1),
            f"{alone}{beside}: {here:,} {counts.used}, {before:,} alone{why}",
        )
    return best[1]


_MUCH_MORE = 1.2
"""How many times more work has to be spared together than alone before it is said."""


def _partner(
    analysis: Analysis,
    whole: str,
    changed: Mapping[str, str],
    factor: str,
    spared: Mapping[tuple[str, str], int],
) -> tuple[str, str]:
    """(the factor that lets another one spare more, what shows it); ("", "") if nothing does."""
    here = spared[whole, factor]
    without = {
        other: spared[cell, factor]
        for cell, entry in analysis["cells"].items()
        for other in changed
        if other != factor
        and (cell, factor) in spared
        and entry["levels"] == analysis["cells"][whole]["levels"] | {other: _off(analysis, other)}
    }
    if without:
        other = min(without, key=lambda name: without[name])
        shown = f", {without[other]:,} with everything on but {other}"
        return (other, shown) if without[other] * _MUCH_MORE <= here else ("", "")
    known = counts_of(factor, changed[factor]).partner
    if known and known[0] in changed:
        return known[0], f" ({known[1]})"
    return "", ""


def _off(analysis: Analysis, factor: str) -> Any:
    return analysis["cells"][analysis["baseline"]]["levels"].get(factor)


def with_prices(shown: Mapping[str, str], found: Prices | None) -> dict[str, str]:
    """The names of configurations, those that have a price followed by it."""
    return {cell: name + text.price_of({"price": found}, cell) for cell, name in shown.items()}


_PRICE_VERDICTS = {
    "within margin": "within the margins of the study",
    "outside": "outside the margins of the study",
    "undecided": "undecided: the prompts show neither that it is within the margins nor that it is outside",
}


def price(row: PriceRow, level: float) -> str:
    """ "0.0041 nats per token (95 % interval 0.0032 to 0.0052), top choice kept in 98.9 % (99.6 % by
    rounding to bfloat16 alone); within the margins of the study".
    """
    kl = of(row, "kl")
    return (
        f"{text.nats(kl['price'])} nats per token ({text.percent(1 - level, 0)} interval {text.nats(kl['low'])} to "
        f"{text.nats(kl['high'])}), top choice kept in {text.percent(row['kept'])} ({text.percent(row['kept_by_floor'])} by "
        f"rounding to {row['dtype']} alone); {_PRICE_VERDICTS[row['verdict']]}"
    )


def prices(analysis: Analysis) -> list[str]:
    """A sentence for each configuration that has a price, and for each whose price is unknown."""
    if (found := analysis.get("price")) is None:
        return []
    return [
        *(
            f"{text.plain_name(analysis, row['cell'])} changes it: {price(row, found['level'])}."
            for row in found["rows"]
        ),
        *(
            f"{text.plain_name(analysis, cell)} has no speed here, because its price is unknown: {reason.rstrip('.')}."
            for cell, reason in found["unknown"].items()
        ),
    ]
