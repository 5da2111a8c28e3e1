"""Pairwise testing: a small set of configurations, found greedily, in which every two levels of
different optimizations occur together.

Most faults of optimizations need two of them together. Testing each alone would miss those, and all
combinations would take hundreds of launches. (Cohen et al., "The AETG system", IEEE TSE 1997, on
why pairs, and why greedy is good enough.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.records.types import Config

Choice = Config
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(choice: Choice) -> set[Pair]:
    return set(itertools.combinations(sorted(choice.items(), key=lambda item: item[0]), 2))


def combinations(
    levels: Mapping[str, Sequence[Any]], allowed: Callable[[Choice], bool]
) -> Iterator[Choice]:
    """All allowed combinations of one level per optimization, in the order of the levels."""
    for values in itertools.product(*levels.values()):
        choice = dict(zip(levels, values, strict=True))
        if allowed(choice):
            yield choice


def pairwise(
    levels: Mapping[str, Sequence[Any]],
    allowed: Callable[[Choice], bool] = lambda choice: True,
    first: Sequence[Choice] = (),
) -> list[Choice]:
    """`first`, extended by further choices until it covers every pair of levels that occurs in any
    allowed choice. Raises ValueError if `first` holds a choice that is not allowed.
    """
    pool = list(combinations(levels, allowed))
    if foreign := [choice for choice in first if choice not in pool]:
        raise ValueError(f"{foreign[0]} is not an allowed combination of {dict(levels)}")
    chosen = [choice for i, choice in enumerate(first) if choice not in first[:i]]
    missing = set().union(*map(pairs_of, pool)) - set().union(*map(pairs_of, chosen))
    while missing:
        best = max(pool, key=lambda choice: len(pairs_of(choice) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen
