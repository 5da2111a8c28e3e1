"""What the configurations of a study are called on a page: one name, one meaning.

A plan's cells are called `baseline`, `aa`, `all`; a baseline is everything off in one study and
everything on in another. Readers see `all off`, `all on`, `A/A twin` and `reference: vLLM 0.33.0`.
Changes of single toggles keep their own names, which say what they change.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.records.types import Plan
from nanovllm.config import LEVELS
from reports.analysis.types import Analysis

TWIN, ALL_OFF, ALL_ON = "A/A twin", "all off", "all on"
ENGINES = {"hf": "HF", "vllm": "vLLM"}
# How many processes share the work is no optimization of one engine: `all on` says nothing of it.
_SHARING = {"tensor_parallel_size", "data_parallel_size", "all_reduce"}
# As plans write it: the first level of each, a switch as a word.
_OFF = {factor: "off" if levels[0] is False else levels[0] for factor, levels in LEVELS.items()}


def shown_names(plan: Plan, launches: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{cell: its name on a page}, in the order of the plan; no two are the same.

    launches: records that count, for the versions of other engines.
    """
    versions = {
        record["cell"]: record["resolved"].get("version")
        for record in launches
        if isinstance(record.get("resolved"), Mapping)
    }
    names = {name: _name(name, cell, versions.get(name)) for name, cell in plan["cells"].items()}
    taken = Counter(names.values())
    return {
        name: found
        if taken[found] == 1 or name == plan["cells"][name]["engine"]
        else f"{found} ({name.removeprefix(plan['cells'][name]['engine'] + '-')})"
        for name, found in names.items()
    }


def _name(name: str, cell: Mapping[str, Any], version: str | None) -> str:
    if cell["role"] == "aa":
        return TWIN
    if cell["role"] == "all":
        return ALL_ON
    if cell["role"] == "reference":
        return f"reference: {engine(cell['engine'], version)}"
    if cell["role"] == "baseline":
        return baseline_name(cell["levels"])
    return name


def baseline_name(levels: Mapping[str, Any]) -> str:
    """`all off`, `all on`, or `baseline` where some of the toggles are on."""
    off = {factor for factor, level in levels.items() if level == _OFF.get(factor)}
    if off == set(levels):
        return ALL_OFF
    return "baseline" if off - _SHARING else ALL_ON


def engine(name: str, version: str | None = None) -> str:
    """An engine as readers know it, with its version: vLLM 0.33.0."""
    return f"{ENGINES.get(name, name.rpartition('.')[2])}{f' {version}' if version else ''}"


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
        f"{_listed([f'all-but-{factor}' for factor in factors])} "
        f"{'switches' if len(factors) == 1 else 'switch'} {_listed(also)} off as well: "
        f"{_listed(also)} {'needs' if len(also) == 1 else 'need'} {_listed(factors)}."
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
                f"{_listed([*factors])}, added last: {_listed(shared)} {why} in both configurations."
            )
        else:
            why = f"{'it needs' if it else 'they need'} {_listed(shared)}, which {'is' if one else 'are'} on"
            sentences.append(f"{_listed([*factors])}, on top: {why} in both configurations.")
    return sentences


def _listed(names: Sequence[str]) -> str:
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
