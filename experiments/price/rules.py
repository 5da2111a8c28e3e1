"""What a price is made of, and which configurations have one. Standard library only.

A *lossy* optimization changes the output on purpose: its row in the table of toggles says so
(nanovllm/toggles). A study with such a factor registers margins before it runs; its plan holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.records.factor_levels import level_name
from experiments.records.types import Config, Levels
from nanovllm.config import BASELINE
from nanovllm.toggles.row import toggles_of

METRICS = {
    "kl": "KL divergence in nats per token",
    "top_choice": "share of tokens whose most likely token is another one",
    "log_perplexity": "log of the perplexity over the reference's",
}
"""What is measured, in words. Of each, more is worse; the compute dtype's own share is subtracted."""
MARGINS = {"kl": 0.02, "top_choice": 0.01, "log_perplexity": 0.01}
"""The margins of a study that states none."""
LEVEL = 0.05
LEAST_PROMPTS = 32
"""With fewer, the intervals do not cover what they promise (docs/methodology.md)."""
PROMPTS: dict[str, Any] = {
    "kind": "random",
    "num_requests": 64,
    "prompt_tokens": [32, 96],
    "output_tokens": 1,
}
"""The held prompts of a study that states none: random tokens, which any model can read."""


def lossless_levels() -> dict[str, Any]:
    """{toggle that changes the output: its baseline, which does not}."""
    return {
        name: row.levels[0]
        for name, row in toggles_of(BASELINE).items()
        if getattr(row, "lossy", False)
    }


def lossy_levels(config: Config) -> Levels:
    """{toggle: level}, as studies write levels, of what changes the output in an engine's settings:
    its own optimizations, or settings of another engine under the same names.
    """
    given = {**config, **(config.get("optimizations") or {})}
    return {
        name: level_name(given[name])
        for name, baseline in lossless_levels().items()
        if given.get(name) is not None and level_name(given[name]) != level_name(baseline)
    }


def check_margins(given: Any) -> dict[str, float]:
    """The margin of every metric, completed with the defaults. Raises ValueError with what was given
    and what is allowed.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{given!r} is no mapping; allowed: {_example()}")
    for name, margin in given.items():
        if name not in METRICS:
            raise ValueError(f"{name}: unknown metric; allowed: {', '.join(METRICS)}")
        number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not number or not 0 < margin < 10:
            raise ValueError(
                f"{name}: {margin!r} is no margin; allowed: a number above 0 and below 10, in the metric's unit "
                f"({METRICS[name]}), such as {MARGINS[name]}"
            )
    return {name: float(given.get(name, margin)) for name, margin in MARGINS.items()}


def _example() -> str:
    return "{" + ", ".join(f"{name}: {margin}" for name, margin in MARGINS.items()) + "}"
