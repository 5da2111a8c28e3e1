"""What the configurations of a plan are called for people: one name, one meaning, from the plan on the
terminal to the report and MLflow.

A plan's cells are called `baseline`, `aa`, `all`; a baseline is everything off in one study and
everything on in another. Readers see `all off`, `all on`, `A/A twin` and `reference: vLLM 0.33.0`.
Changes of single toggles keep their own names, which say what they change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.records.types import Plan
from nanovllm.config import LEVELS

TWIN, ALL_OFF, ALL_ON = "A/A twin", "all off", "all on"
ENGINES = {
    "hf": "HF",
    "vllm": "vLLM",
    "nanovllm_server": "nanovllm serve",
    "vllm_server": "vllm serve",
}
# How many processes share the work is no optimization of one engine: `all on` says nothing of it.
_SHARING = {"tensor_parallel_size", "data_parallel_size", "all_reduce"}
# As plans write it: the first level of each, a switch as a word.
_OFF = {factor: "off" if levels[0] is False else levels[0] for factor, levels in LEVELS.items()}


def shown_names(plan: Plan, launches: Sequence[Mapping[str, Any]] = ()) -> dict[str, str]:
    """{cell: its name for people}, in the order of the plan; no two are the same.

    launches: records that count, for the versions of other engines; without any, as before a study
    runs, no version is named.
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


def is_off(factor: str, level: Any) -> bool:
    """Whether a level is the one at which a toggle is off."""
    return bool(factor in _OFF and str(level) == str(_OFF[factor]))


def engine(name: str, version: str | None = None) -> str:
    """An engine as readers know it, with its version: vLLM 0.33.0."""
    return f"{ENGINES.get(name, name.rpartition('.')[2])}{f' {version}' if version else ''}"
