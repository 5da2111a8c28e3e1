"""Rules that mark a launch invalid for what the machine did while it ran. Standard library only.

The limits are part of the plan, so they are fixed before anything runs, and none looks at how fast
the launch was. An invalid launch is kept, listed with its reason, never counted and never run again
(docs/adr/0002).
"""

from __future__ import annotations

from typing import Any

HARMFUL = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")
THROTTLE_REASONS = (*HARMFUL, "power_cap")
"""What experiments/host/telemetry.py can report. A power cap is how a GPU under full load works: it
is allowed, unless a study forbids it.
"""


def objections(telemetry: dict[str, Any], rules: dict[str, Any] | None) -> list[str]:
    """The rules that a launch broke, each with what was seen and what is allowed; empty for a valid
    one, and for a plan of an older version, which had no rules.
    """
    if rules is None:
        return []
    found = []
    foreign = telemetry["foreign_gpu_pids"]
    if len(foreign) > rules["foreign_gpu_processes"]:
        ids = ", ".join(map(str, foreign[:4]))
        found.append(
            f"{len(foreign)} other processes computed on its GPUs ({ids}); allowed: {rules['foreign_gpu_processes']}"
        )
    if harmful := sorted(set(telemetry["throttle_reasons"]) & set(rules["throttle"])):
        found.append(f"a GPU was slowed down ({', '.join(harmful)})")
    share = telemetry["summary"].get("cpu_foreign", {}).get("mean", 0.0)
    if share > rules["max_foreign_cpu"]:
        found.append(
            f"other processes used {share:.0%} of the CPU; allowed: {rules['max_foreign_cpu']:.0%}"
        )
    return found
