"""What each toggle did in a run, and all counters by name. Loaded when they are asked for."""

from collections import Counter
from dataclasses import fields
from typing import Any

from nanovllm.engine.stats import StepStats
from nanovllm.toggles.row import toggles_of


def toggle_counters(optimizations: Any, stats: StepStats) -> dict[str, dict[str, Any]]:
    """Level, baseline, `engaged` and `opportunity` of each optimization.

    engaged counts what only happens when the level is above its baseline: 0 when off and > 0 when on, or the run
    is invalid. opportunity counts what it could do for this workload: it may be 0, and is None where `engaged`
    says it all.
    """
    return {
        name: {
            "level": getattr(optimizations, name),
            "baseline": row.levels[0],
            "engaged": row.engaged(stats),
            "opportunity": row.opportunity(stats) if row.opportunity else None,
        }
        for name, row in toggles_of(optimizations).items()
    }


def flat(stats: StepStats) -> dict[str, int]:
    """All counters as `name` or `name.key`, JSON-able."""
    items = [(f.name, getattr(stats, f.name)) for f in fields(stats)]
    split = {
        f"{name}.{key}": n[key] for name, n in items if isinstance(n, Counter) for key in sorted(n)
    }
    return {name: n for name, n in items if not isinstance(n, Counter)} | split


def reset(stats: StepStats) -> None:
    """Sets all counters to zero in place, as other objects hold them."""
    for counter in fields(stats):
        value = getattr(stats, counter.name)
        value.clear() if isinstance(value, Counter) else setattr(stats, counter.name, 0)
