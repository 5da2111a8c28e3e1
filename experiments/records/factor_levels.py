"""The notation of factor levels: `on`/`off` in studies, plans and records, true/false in an engine's
config.
"""

from __future__ import annotations

from typing import Any

Level = str | int


def level_name(value: Any) -> Level:
    """True -> "on", False -> "off"; names and numbers stay as they are."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (str, int)):
        return value
    raise ValueError(
        f"{value!r} is not a level of a factor; allowed: on, off, a name or a whole number"
    )


def level_value(level: Level) -> str | int | bool:
    """The value in an engine's config; the inverse of `level_name`."""
    return {"on": True, "off": False}.get(level, level) if isinstance(level, str) else level
