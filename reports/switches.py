"""The rows of a study that measures each optimization alone and added last: the same rows, names and
direction in the table, in the chart and on the terminal.

The ratio of everything on but one (`all-but-X`) to everything off says little about X, and a reader
takes its "faster" for the gain of X, which is what was left out. So every view shows the ratio
"X, added last" in its place: everything on over everything on without X.
"""

from collections.abc import Mapping
from typing import Any

from reports import text

WAYS = {kind: text.KINDS[kind] for kind in ("alone", "left out")}
"""How a study of single toggles measures each of them."""


def by_switch(analysis: Mapping[str, Any], workload: str) -> list[tuple[Any, str]]:
    """(effect, its name) of every toggle alone and added last, in a study that measured both;
    otherwise empty.
    """
    rows = [
        row for row in analysis["factors"] if row["kind"] in WAYS and row["workload"] == workload
    ]
    if {row["kind"] for row in rows} != set(WAYS):
        return []
    order = [*analysis["study"].get("factors", {}), *sorted({row["factor"] for row in rows})]
    rows.sort(key=lambda row: (order.index(row["factor"]), str(row["level"]), row["kind"]))
    return [
        (
            {**row, "cell": row["on"]},
            f"{title(rows, row)}, {way(row)}{text.price_of(analysis, row['on'])}",
        )
        for row in rows
    ]


def title(rows: list[Any], row: Mapping[str, Any]) -> str:
    """What the toggle of a row is called among `rows`: its factor, and its level where several are
    tested.
    """
    levels = {str(other["level"]) for other in rows if other["factor"] == row["factor"]}
    return f"{row['factor']}={row['level']}" if len(levels) > 1 else str(row["factor"])


def way(row: Mapping[str, Any]) -> str:
    """How the toggle of a row was measured: "alone", "added last", or "on top" of everything on, of which
    it is no part.
    """
    return "on top" if not row.get("part_of_all", True) else WAYS[row["kind"]]


def whole_configurations(
    analysis: Mapping[str, Any], workload: str, effects: list[Any]
) -> list[Any]:
    """Those of `effects` of cells that no row of `by_switch` tells of: the A/A twin, everything on, and
    what a study adds of its own.
    """
    told = {row[side] for row, _ in by_switch(analysis, workload) for side in ("on", "off")}
    return [
        effect
        for effect in effects
        if effect["cell"] not in told or analysis["cells"][effect["cell"]]["role"] == "all"
    ]
