"""What the tests do without a mutant: which pass, how long they take, which statements they run. From
that follows which tests a mutant gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from property_tests.mutants.operators import Mutant
from property_tests.mutants.results import Line, digest_of
from property_tests.mutants.rooms import Room

Places = dict[str, frozenset[int]]
"""Numbers of statements, by module."""


@dataclass
class TimedFile:
    """tests: those that pass, with their seconds and what they run; shared: what runs outside of any
    one of them (imports, fixtures of a module); left_out: other tests, and why.
    """

    file: str
    tests: dict[str, tuple[float, Places]] = field(default_factory=dict)
    shared: dict[str, set[int]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def tell(self, message: dict[str, Any]) -> None:
        """Takes a message of worker.py."""
        if "not_collected" in message:
            self.left_out[message["not_collected"] or self.file] = message["message"]
            return
        if "test" not in message:
            return
        for module, numbers in message["shared"].items():
            self.shared.setdefault(module, set()).update(numbers)
        if message["outcome"] == "passed":
            reached = {module: frozenset(n) for module, n in message["reached"].items()}
            self.tests[message["test"]] = message["seconds"], reached
        else:
            self.left_out[message["test"]] = f"{message['outcome']}: {message['message']}"

    @property
    def modules(self) -> set[str]:
        """Those of which it runs something."""
        return {*self.shared, *(name for _, reached in self.tests.values() for name in reached)}

    def line(self, key: str) -> Line:
        return {
            "key": key,
            "modules": {module: digest_of(module) for module in sorted(self.modules)},
            "file": self.file,
            "tests": {
                name: [seconds, {module: sorted(numbers) for module, numbers in reached.items()}]
                for name, (seconds, reached) in self.tests.items()
            },
            "shared": {module: sorted(numbers) for module, numbers in self.shared.items()},
            "left_out": self.left_out,
        }

    @staticmethod
    def of(line: Line) -> TimedFile:
        tests = {
            name: (seconds, {module: frozenset(numbers) for module, numbers in reached.items()})
            for name, (seconds, reached) in line["tests"].items()
        }
        shared = {module: set(numbers) for module, numbers in line["shared"].items()}
        return TimedFile(line["file"], tests, shared, line["left_out"])

    def reaching(self, mutant: Mutant) -> Iterator[tuple[float, str]]:
        """Tests that run its statement. Where that runs outside of any one test: those that run
        something of its module, as they may depend on it.
        """
        module, number = mutant.module, mutant.statement
        outside = number in self.shared.get(module, ())
        for name, (seconds, reached) in self.tests.items():
            numbers = reached.get(module, frozenset())
            if number in numbers or (outside and numbers):
                yield seconds, name


def chosen_tests(
    mutant: Mutant, room: Room, files: dict[str, TimedFile], budget_s: float
) -> dict[str, float]:
    """The tests that may notice the mutant, with their seconds: the quickest first, as many as take
    `budget_s` together, but at least one.
    """
    chosen: dict[str, float] = {}
    total = 0.0
    for seconds, name in sorted(_all(mutant, room, files)):
        total += seconds
        if chosen and total > budget_s:
            break
        chosen[name] = seconds
    return chosen


def _all(mutant: Mutant, room: Room, files: dict[str, TimedFile]) -> Iterable[tuple[float, str]]:
    for file in room.tests:
        if file in files:
            yield from files[file].reaching(mutant)
