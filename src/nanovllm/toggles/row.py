"""What the table of toggles says of each optimization. Loaded when an optimization is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nanovllm.engine.stats import StepStats


@dataclass(frozen=True, kw_only=True)
class Toggle:
    """One optimization.

    levels: the baseline first. Whole numbers are counts: any from 1 to 1,024 may be given, those here are what
    studies vary.
    title: its name in the line that an engine prints when it starts; "" leaves it out.
    best: what 'auto' becomes on a device; the baseline where the device is not named.
    gpu_only: a level -> why it runs on a GPU alone.
    cpu_only: a level -> why it runs on a CPU alone.
    by_triton: levels that need Triton to work.
    lossy: levels above the baseline change what the model computes: tokens are compared with those of a reference that
    makes the same change, and their price is measured beside their speed.
    by_compiler: levels that are compiled from the C++ sources of this package when they are first used.
    needs: (whether the other levels allow this one to leave its baseline in an engine, what they must be in words).
    vllm: (vLLM's argument for it, {that argument's value: our level}). A value that is not listed is the level.
    engaged: how often something happened that only happens above the baseline.
    opportunity: how often it could have helped; None where `engaged` says it all.
    """

    levels: tuple[Any, ...]
    title: str = ""
    best: Mapping[str, Any] = field(default_factory=dict)
    gpu_only: Mapping[Any, str] = field(default_factory=dict)
    cpu_only: Mapping[Any, str] = field(default_factory=dict)
    by_triton: tuple[Any, ...] = ()
    lossy: bool = False
    by_compiler: tuple[Any, ...] = ()
    needs: tuple[Callable[[Mapping[str, Any]], bool], str] | None = None
    vllm: tuple[str, Mapping[Any, Any]] | None = None
    engaged: Callable[[StepStats], int]
    opportunity: Callable[[StepStats], int] | None = None

    def refuses(self, level: Any) -> str:
        """What a level must be, if the given one is not allowed; else an empty string."""
        if type(self.levels[0]) is int:
            fits = type(level) is int and 1 <= level <= 1024
            return "" if fits else "a whole number of processes, 1 to 1024"
        allowed = dict.fromkeys((*self.levels, "auto"))
        fits = any(level == known and type(level) is type(known) for known in allowed)
        return "" if fits else "one of " + ", ".join(map(repr, allowed))


def toggles_of(optimizations: Any) -> dict[str, Toggle]:
    """The rows of a dataclass of toggles, or of its instance, by name. Raises TypeError for a row that says
    something unknown.
    """
    return {f.name: Toggle(**f.metadata) for f in fields(optimizations)}
