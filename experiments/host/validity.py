"""Rules that mark a launch invalid: other activity on the machine, and toggles that did not do what
was asked. Standard library only.

The limits are part of the plan, so they are fixed before anything runs, and none depends on how fast
the launch was. An invalid launch is kept and listed with the reason, but never counted and never
repeated (docs/adr/0002).
"""

from __future__ import annotations

from experiments.records.factor_levels import level_name
from experiments.records.types import Config, Telemetry, Toggles, ValidityRules

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


def wrong_toggles(toggles: Toggles, config: Config) -> list[str]:
    """Toggles that are not at the requested level, that are on but had no effect, or that are off
    but had one.
    """
    problems = []
    requested = {name: level_name(value) for name, value in config.get("optimizations", {}).items()}
    for factor, toggle in toggles.items():
        if factor in requested and toggle["level"] != requested[factor]:
            problems.append(
                f"{factor}={requested[factor]} was requested, but it ran at {toggle['level']}"
            )
        is_on = toggle["level"] != toggle["baseline"]
        if is_on and toggle["engaged"] == 0:
            problems.append(f"{factor}={toggle['level']} never engaged")
        if not is_on and toggle["engaged"] > 0:
            problems.append(
                f"{factor} is at its baseline, {toggle['level']}, but engaged {toggle['engaged']} times"
            )
    return problems
