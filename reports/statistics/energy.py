"""Energy of a serving: the mean power sampled while it ran, times its duration, over its tokens and
requests.

Power is that of the whole GPUs or CPU packages that were sampled, idle power included. Nothing is
computed where the machine reported no power, or too few samples fell into the serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

LEAST_SAMPLES = 3


class Energy(TypedDict):
    """source: gpu or cpu. watts: mean over the serving."""

    source: str
    watts: float
    joules_per_output_token: float
    joules_per_request: float


def of_workload(record: Mapping[str, Any], name: str) -> list[Energy]:
    """The energy of one workload of a launch, for each source that reported power."""
    work = record["workloads"][name]
    window = work.get("window_s")
    if window is None:  # records of older versions
        return []
    inside = [
        sample
        for sample in record["telemetry"].get("samples") or ()
        if window[0] <= sample["time_s"] <= window[1]
    ]
    found: list[Energy] = []
    for source in ("gpu", "cpu"):
        watts = [value for sample in inside if (value := _watts(sample, source)) is not None]
        if len(watts) < LEAST_SAMPLES:
            continue
        mean = sum(watts) / len(watts)
        joules = mean * work["duration_s"]
        found.append(
            {
                "source": source,
                "watts": mean,
                "joules_per_output_token": joules / work["output_tokens"],
                "joules_per_request": joules / work["num_requests"],
            }
        )
    return found


def _watts(sample: Mapping[str, Any], source: str) -> float | None:
    """The power of all GPUs, or of all CPU packages; None if one of them is unknown."""
    if source == "cpu":
        return sample.get("cpu_watts")
    gpus = [gpu.get("watts") for gpu in sample.get("gpus") or ()]
    return float(sum(gpus)) if gpus and None not in gpus else None
