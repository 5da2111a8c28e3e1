"""Rules that mark a launch invalid because of other activity on the machine. Standard library only.

The limits are part of the plan, so they are fixed before anything runs, and none depends on how fast
the launch was. An invalid launch is kept and listed with the reason, but never counted and never
repeated (docs/adr/0002).
"""

from __future__ import annotations

from experiments.records.types import Telemetry, ValidityRules

HARMFUL = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")
THROTTLE_REASONS = (*HARMFUL, "power_cap")
"""The reasons that experiments/host/telemetry.py can report. A GPU under full load usually runs at
its power cap, so that is allowed unless a study forbids it.
"""


def objections(telemetry: Telemetry, rules: ValidityRules | None) -> list[str]:
    """The rules that a launch violated, each with what was observed and what is allowed. Empty for a
    valid launch, and for plans of an older version, which had no rules.
    """
    if rules is None:
        return []
    found = []
    foreign = telemetry["foreign_gpu_pids"]
    if len(foreign) > rules["foreign_gpu_processes"]:
        ids = ", ".join(map(str, foreign[:4]))
        found.append(
            f"{len(foreign)} other processes used its GPUs ({ids}); allowed: {rules['foreign_gpu_processes']}"
        )
    if harmful := sorted(set(telemetry["throttle_reasons"]) & set(rules["throttle"])):
        found.append(f"a GPU was throttled ({', '.join(harmful)})")
    share = telemetry["summary"].get("cpu_foreign", {}).get("mean", 0.0)
    if share > rules["max_foreign_cpu"]:
        found.append(
            f"other processes used {share:.0%} of the CPU; allowed: {rules['max_foreign_cpu']:.0%}"
        )
    return found
