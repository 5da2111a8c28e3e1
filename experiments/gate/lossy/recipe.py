"""What an engine rounds beyond its dtype. Standard library only."""

from __future__ import annotations

from typing import NamedTuple

from experiments.records.types import Config


class Recipe(NamedTuple):
    """Levels of the toggles that change what is computed, as in an engine's `optimizations`."""

    quantization: str = "none"
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        on = [
            f"{name}={level}" for name, level in self._asdict().items() if level != DEFAULTS[name]
        ]
        return ", ".join(on) or "nothing rounded"


DEFAULTS = Recipe._field_defaults
EXACT = Recipe()
"""Of an engine that computes what the checkpoint says, up to the noise of its dtype."""


def recipe_of(config: Config) -> Recipe:
    """That of an engine's configuration. Plans made before there was a toggle do not name it."""
    on: Config = config.get("optimizations") or {}
    return Recipe(**{name: str(on.get(name, off)) for name, off in DEFAULTS.items()})
