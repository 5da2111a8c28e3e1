"""The highest rate at which a study's objective holds, found by bisection within one launch.

Every trial serves the same requests with the same arrivals, scaled to its rate (common random
numbers), so two trials differ in their rate alone. A trial passes if the stated share of its requests
meets the objective; it is given up as soon as it can no longer pass. The search stops when the lowest
rate that failed is at most `within` times the highest that passed, or after `most` trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from experiments.load.driving import Watch
from experiments.load.objective import meets
from experiments.records.types import Objective, Params


@dataclass(frozen=True)
class Found:
    """rate: the highest rate that passed; None if none did. failed: the lowest rate that failed."""

    rate: float | None
    failed: float | None
    stopped: Literal["within", "most", "low failed", "high passed"]


def search(trial: Callable[[float], bool], params: Params) -> Found:
    """Bisects on the logarithm of the rate, from `low` to `high` (arrivals.SEARCH). trial: serves at
    a rate; whether the objective held. Assumes that it holds at every rate below one at which it
    holds; noise in a trial near the limit moves the result by about one step of the bisection.
    """
    low, high = float(params["low"]), float(params["high"])
    if not trial(low):
        return Found(None, low, "low failed")
    if trial(high):
        return Found(high, None, "high passed")
    for _ in range(params["most"] - 2):
        if high <= low * params["within"]:
            return Found(low, high, "within")
        middle = math.sqrt(low * high)
        if trial(middle):
            low = middle
        else:
            high = middle
    return Found(low, high, "within" if high <= low * params["within"] else "most")


def allowed_misses(requests: int, attainment: float) -> int:
    """How many of `requests` may miss the objective if this share has to meet it."""
    # 1 - 0.99 is a little more than 0.01 in binary, or less
    return math.floor(round((1 - attainment) * requests, 9))


@dataclass
class Judge:
    """Counts the requests of a trial that missed the objective; `watch` ends a trial that can no
    longer pass, if it may.
    """

    objective: Objective
    allowed: int
    may_give_up: bool = True
    misses: int = field(default=0, init=False)
    finished: int = field(default=0, init=False)

    def restarted(self) -> Watch:
        """Forgets what was counted; the `watch` for a new attempt."""
        self.misses = self.finished = 0
        return self.watch

    def watch(self, index: int, due_s: float, token_s: list[float]) -> bool:
        """A driving.Watch."""
        self.finished += 1
        self.misses += not meets(self.objective, due_s, token_s)
        return self.may_give_up and not self.passes

    @property
    def passes(self) -> bool:
        return self.misses <= self.allowed
