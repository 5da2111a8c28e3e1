"""What each optimization did in a launch, in words: its two counters, named after what they count.

`engaged` and `opportunity` are the engine's (src/nanovllm/toggles/table.py): how often it ran, and how
often that had a use. Their units differ from one optimization to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reports.analysis import names
from reports.analysis.types import Analysis
from reports.text import level_range


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
}
_UNKNOWN = Counts("times", "times", "with something to do")


def of(factor: str, level: Any) -> Counts:
    """What the counters of a factor at this level count."""
    return COUNTS.get(f"{factor}={level}") or COUNTS.get(factor, _UNKNOWN)


def did(row: Mapping[str, Any]) -> str:
    """What an optimization did, from a row of the analysis's toggles: "120 lookups, 18,560 prompt
    tokens found". The least to the most over launches where they differ.
    """
    counts = of(row["factor"], row["level"])
    said = f"{level_range(row['engaged'])} {counts.ran}"
    if row["opportunity"] is None:
        return said
    idle = row["opportunity"][1] == 0
    none = ": nothing to gain in this workload" if idle else ""
    return f"{said}, {level_range(row['opportunity'])} {counts.used or _UNKNOWN.used}{none}"


def did_in_short(row: Mapping[str, Any]) -> str:
    """The same for a narrow column, the most of all launches: "18,560 found"."""
    counts = of(row["factor"], row["level"])
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
    changed = dict(change.split("=", 1) for change in names.changes(analysis, whole))
    spared = {
        (row["cell"], row["factor"]): row["opportunity"][1]
        for row in analysis["toggles"]["rows"]
        if row["workload"] == workload and row["opportunity"] is not None
    }
    best: tuple[float, str] = (_MUCH_MORE, "")
    for factor, level in changed.items():
        counts, alone = of(factor, level), f"{factor}={level}"
        single = next(
            (cell for cell in cells if names.changes(analysis, cell) == [alone]),
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
    known = of(factor, changed[factor]).partner
    if known and known[0] in changed:
        return known[0], f" ({known[1]})"
    return "", ""


def _off(analysis: Analysis, factor: str) -> Any:
    return analysis["cells"][analysis["baseline"]]["levels"].get(factor)
