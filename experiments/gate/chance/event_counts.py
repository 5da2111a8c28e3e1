"""Whether something happened more often than it may. Standard library only: reports, which know no
torch, count again.
"""

from __future__ import annotations

import math

RATES = (1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 64.0, 256.0)
"""How many times too often an event may have happened."""


def evidence_of_count(count: int, expected: float) -> float:
    """The log evidence that an event happened too often: `count` times, where its probabilities,
    given what came before each time, add up to `expected` at most.

    For a rate r, r^count e^(-(r - 1) expected) has a mean of at most 1, as each of its factors has;
    so has the mean over several rates, which exceeds 1 / level with a probability of at most that
    level (Markov's inequality), for any number of events.
    """
    logs = [count * math.log(rate) - (rate - 1) * expected for rate in RATES]
    largest = max(logs)
    return largest + math.log(sum(math.exp(log - largest) for log in logs) / len(RATES))
