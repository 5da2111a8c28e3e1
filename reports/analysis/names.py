"""What a report says of its configurations beside their names, which are those of
experiments/records/cell_names.py.
"""

from collections.abc import Sequence

from reports.analysis.types import Analysis


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
