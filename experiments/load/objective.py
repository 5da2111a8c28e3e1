"""Service level objectives: limits on the latencies of a request. A request meets an objective if it
keeps every limit; goodput counts the requests that do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.records.types import Objective

LIMITS = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token: the mean gap after the first token",
    "itl_s": "inter-token latency: the longest gap after the first token",
    "e2e_s": "end-to-end: from the due time to the last token",
}
PRESETS: dict[str, Objective] = {
    "mlperf-llama2-70b": {"ttft_s": 2.0, "tpot_s": 0.2},
    "mlperf-llama2-70b-interactive": {"ttft_s": 0.45, "tpot_s": 0.04},
    "mlperf-llama3.1-8b": {"ttft_s": 2.0, "tpot_s": 0.1},
    "mlperf-llama3.1-8b-interactive": {"ttft_s": 0.5, "tpot_s": 0.03},
    "mlperf-llama3.1-405b": {"ttft_s": 6.0, "tpot_s": 0.175},
}
"""Pairs of MLPerf Inference's Server and Interactive scenarios (rounds 4.1 to 5.1), which ask for them
at p99.
"""


def check(given: Any) -> Objective:
    """An objective by the name of a preset, or as a mapping of limits in seconds. Raises ValueError
    that names what was given and what is allowed.
    """
    if isinstance(given, str):
        if given not in PRESETS:
            raise ValueError(
                f"slo: {given!r} is not a preset; allowed: {', '.join(PRESETS)}, or a mapping of {', '.join(LIMITS)}"
            )
        return dict(PRESETS[given])  # type: ignore[return-value]
    if not isinstance(given, dict) or not given or set(given) - set(LIMITS):
        raise ValueError(
            f"slo: {given!r} is not allowed; allowed: a mapping of one or more of {', '.join(LIMITS)}, in seconds, or a "
            f"preset: {', '.join(PRESETS)}"
        )
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e6:
            raise ValueError(f"slo.{name}: {value!r} is not allowed; allowed: seconds above 0")
    return dict(given)  # type: ignore[return-value]


def latencies(due_s: float, token_s: Sequence[float]) -> Objective:
    """The latencies of a request that has all its tokens, by the names of the limits. Without a
    second token it has no tpot_s and no itl_s.
    """
    found: Objective = {"ttft_s": token_s[0] - due_s, "e2e_s": token_s[-1] - due_s}
    if len(token_s) > 1:
        found["tpot_s"] = (token_s[-1] - token_s[0]) / (len(token_s) - 1)
        found["itl_s"] = max(b - a for a, b in itertools.pairwise(token_s))
    return found


def meets(objective: Objective, due_s: float, token_s: Sequence[float]) -> bool:
    """Whether a request kept every limit. A limit on the gaps between tokens is kept by a request
    of one token; a request without tokens keeps none.
    """
    if not token_s:
        return False
    found = latencies(due_s, token_s)
    return all(found.get(name, 0.0) <= limit for name, limit in objective.items())  # type: ignore[operator]
