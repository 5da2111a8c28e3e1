"""What each toggle did in a run. Loaded when it is asked for."""

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
