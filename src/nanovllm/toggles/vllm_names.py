"""Translates vLLM's constructor arguments. Loaded only when one is given that this engine calls by
another name.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from nanovllm.toggles.row import Toggle, toggles_of
from nanovllm.toggles.table import ALL


def switches(toggles: Mapping[str, Toggle]) -> dict[str, tuple[str, Mapping[Any, Any]]]:
    """{vLLM's name: (our name, {vLLM's value: our level})}; a value that is not listed is the level."""
    return {row.vllm[0]: (name, row.vllm[1]) for name, row in toggles.items() if row.vllm}


TOGGLES = toggles_of(ALL)
SWITCHES = switches(TOGGLES)


def translate(kwargs: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Arguments of EngineConfig, for some that may be vLLM's. own: the names that EngineConfig knows. None leaves
    a switch as it is, as in vLLM.

    Raises TypeError for an unknown argument, and where a switch is given twice; ValueError for a switch that is
    neither on nor off.
    """
    known = {*own, *SWITCHES} - {"model"}
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(
            f"unknown argument {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    given = {
        name: value for name, value in kwargs.items() if name in SWITCHES and value is not None
    }
    named = [name for name in kwargs if name in SWITCHES]
    if "optimizations" in kwargs and named:
        raise TypeError(
            f"{', '.join(named)} given twice: inside `optimizations` and as an argument of vLLM's; keep one"
        )
    changes = {}
    for name, value in given.items():
        ours, levels = SWITCHES[name]
        is_count = type(TOGGLES[ours].levels[0]) is int
        if not is_count and type(value) is not bool:
            raise ValueError(f"{name}={value!r} is not allowed; it must be True, False or None")
        changes[ours] = levels.get(value, value)
    others = {name: value for name, value in kwargs.items() if name in own}
    return {**others, "optimizations": dataclasses.replace(ALL, **changes)}
