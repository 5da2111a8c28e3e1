"""How much a property is tried: `fast` in every run of the test suite, `deep` for over an hour
(`make property DEEP=1`).

`@holds(fast=60, name=strategy, ...)` makes a Hypothesis test of a function; the deep profile
multiplies the number of examples. What it is made of stays at hand (`test.property`), so that bad
implementations can be tried against the very same property.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy

ROOT = Path(__file__).parents[2]
DEEP_FACTOR = 100
"""Examples of the deep profile for one of the fast one."""

COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "verbosity": Verbosity.normal,
    # Said, as Hypothesis otherwise takes True where CI is set: each run and each seed would try the
    # same examples again.
    "derandomize": False,
}


def register() -> None:
    """fast and deep each have a database of their own: what failed there is tried first next time.
    repeat is fast without one. All are random, whatever the shell says (CI, HYPOTHESIS_*):
    --hypothesis-seed alone makes two runs the same. mutants (`make mutants`) does not shrink what
    fails.
    """
    for name in ("fast", "deep", "repeat"):
        database = (
            None if name == "repeat" else DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / name)
        )
        settings.register_profile(name, database=database, print_blob=True, **COMMON)
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile(
        "mutants", database=None, phases=phases, report_multiple_bugs=False, **COMMON
    )
    settings.load_profile("fast")


def deep() -> bool:
    return settings.get_current_profile_name() == "deep"


def examples(fast: int, factor: int = DEEP_FACTOR) -> int:
    """How many examples the profile in force gives to a property that gets `fast` of them in the
    fast one.
    """
    return fast * factor if deep() else fast


@dataclass(frozen=True)
class Property:
    """A function that raises AssertionError where what it was given does not hold."""

    name: str
    body: Callable[..., None]
    strategies: dict[str, SearchStrategy[Any]]
    fast: int

    @property
    def what(self) -> str:
        """The first paragraph of its docstring, on one line."""
        return " ".join((self.body.__doc__ or "").strip().split("\n\n")[0].split())


def holds(
    fast: int, factor: int = DEEP_FACTOR, **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Any]:
    """Makes a test of a function: it must hold for whatever the strategies draw. factor: times as
    many in the deep profile.
    """

    def make(body: Callable[..., None]) -> Any:
        test = settings(max_examples=examples(fast, factor))(given(**strategies)(body))
        test.property = Property(body.__name__.removeprefix("test_"), body, strategies, fast)
        return test

    return make
