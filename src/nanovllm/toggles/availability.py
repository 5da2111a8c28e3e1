"""What 'auto' becomes, and which level cannot run where. Loaded when an optimization is asked for."""

from typing import Any

from nanovllm.toggles.row import toggles_of


def check(optimizations: Any) -> None:
    """Raises ValueError for an unknown level, with what is allowed."""
    for name, row in toggles_of(optimizations).items():
        level = getattr(optimizations, name)
        if allowed := row.refuses(level):
            raise ValueError(f"{name}={level!r} is not allowed; it must be {allowed}")


def resolve(optimizations: Any, device: str, in_engine: bool) -> dict[str, Any]:
    """The level of each toggle, without 'auto'. A toggle whose `needs` the others do not meet keeps its baseline
    where 'auto' was asked for.

    Raises ValueError for a level that cannot run on `device`, with what to use instead; in_engine: also for one
    whose `needs` are not met.
    """
    toggles, asked = toggles_of(optimizations), vars(optimizations)
    chosen = {
        name: row.best.get(device, row.levels[0]) if asked[name] == "auto" else asked[name]
        for name, row in toggles.items()
    }
    for name, row in toggles.items():
        baseline = row.levels[0]
        if asked[name] == "auto" and row.needs and not row.needs[0](chosen):
            chosen[name] = baseline
        level = chosen[name]
        if level in row.gpu_only and device != "cuda":
            raise ValueError(
                f"{name}={level!r} cannot run on device {device!r}: {row.gpu_only[level]}. "
                f"Use {name}={baseline!r}, or a machine with an NVIDIA GPU."
            )
        if in_engine and level != baseline and row.needs and not row.needs[0](chosen):
            raise ValueError(f"{name}={level!r} needs {row.needs[1]}. Use {name}={baseline!r}.")
    return chosen
