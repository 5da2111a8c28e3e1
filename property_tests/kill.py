"""Tries a bad implementation against a property.

It is killed by an assertion of the property, of its helpers, or of `check_invariants`, and by
nothing else: an example in which the engine merely crashes is thrown away, and the search goes on.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, Verbosity, given, reject, settings
from hypothesis.errors import HypothesisException
from hypothesis.stateful import run_state_machine_as_test

from nanovllm.engine import invariants
from property_tests.bad_implementations import BadImplementation
from property_tests.support import model_free_llm
from property_tests.support.checked_engine import CheckedEngine, EngineMachine
from property_tests.support.profiles import Property

HERE = Path(__file__).parent
MODULES = ("scheduler", "engine", "sampling", "kernel", "request", "resource")
PATIENCE_S = 2.0
"""Of a client of a bad implementation. Those that wait for ever wait twice: Hypothesis repeats what failed."""
MACHINE = Property("engine_machine", EngineMachine, {}, 120)  # type: ignore[arg-type]


@cache
def properties() -> dict[str, Property]:
    """Every property of the fast suite by name, the state machine first."""
    found = {MACHINE.name: MACHINE}
    for module in MODULES:
        for value in vars(import_module(f"property_tests.test_{module}_properties")).values():
            if isinstance(own := getattr(value, "property", None), Property) and not getattr(
                value, "pytestmark", ()
            ):
                found[own.name] = own
    return found


EXAMPLES = {
    "engine_machine": 1500,
    "whole_workloads": 1500,
    "replayed_graphs_change_nothing": 60,
    "preemption_changes_nothing": 60,
}


def examples_for(bad: BadImplementation, tested: Property) -> int:
    """Many for the property that must kill it: they are drawn until one does. A third of the fast
    number for any other.
    """
    return (
        EXAMPLES.get(tested.name, max(tested.fast, 20))
        if tested.name == bad.killer
        else -(-tested.fast // 3)
    )


@dataclass(frozen=True)
class Verdict:
    killed: bool
    message: str


def kill(bad: BadImplementation, tested: Property, max_examples: int) -> Verdict:
    """Runs the property on the bad implementation; always the same examples."""
    chosen = settings(
        max_examples=max_examples,
        stateful_step_count=30,
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )
    try:
        with bad.installed(), patch.object(model_free_llm, "PATIENCE_S", PATIENCE_S):
            if tested is MACHINE:
                run_state_machine_as_test(JudgedMachine, settings=chosen)
            else:
                chosen(given(**tested.strategies)(judged(tested.body)))()
    # whatever it was, it was no verdict (examples were not even drawn, say)
    except Exception as error:  # noqa: BLE001
        if not is_verdict(error):
            return Verdict(False, f"no verdict: {type(error).__name__}: {error}")
        return Verdict(True, (str(error).strip() or "assertion").splitlines()[0])
    return Verdict(False, "")


def is_verdict(error: BaseException) -> bool:
    """Does it come from a property or from the invariants, rather than from inside the engine or a
    patch?
    """
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename)
    oracle = file == Path(invariants.__file__) or (
        file.parent in (HERE, HERE / "support") and file.name != "bad_implementations.py"
    )
    return isinstance(error, AssertionError) and oracle


def judged(body: Callable[..., None]) -> Callable[..., None]:
    def run(**drawn: Any) -> None:
        try:
            body(**drawn)
        except HypothesisException:
            raise
        except Exception as error:
            if is_verdict(error):
                raise
            reject()

    return run


class JudgedEngine(CheckedEngine):
    """CheckedEngine that does nothing any more once the engine under it has crashed."""

    crashed = False

    def _judge(self, call: Callable[..., Any], *args: Any) -> Any:
        if self.crashed:
            return False
        try:
            return call(*args)
        except Exception as error:
            if is_verdict(error):
                raise
            self.crashed = True
            return False

    def add(self, prompt: tuple[int, ...], max_tokens: int, stops: frozenset[int]) -> bool:
        return bool(self._judge(super().add, prompt, max_tokens, stops))

    def abort(self, request_id: str) -> None:
        self._judge(super().abort, request_id)

    def step(self) -> None:
        self._judge(super().step)

    def finish(self) -> None:
        self._judge(super().finish)


class JudgedMachine(EngineMachine):
    engine_type = JudgedEngine
