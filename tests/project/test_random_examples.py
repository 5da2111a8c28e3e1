"""Where CI is set, Hypothesis derandomizes whatever does not say otherwise: fifty repetitions would
be one. And what `python -m property_tests.repeat` repeats.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from property_tests import repeat
from property_tests.support.profiles import Property

ROOT = Path(__file__).parents[2]
DRAW = """
import random, sys
from hypothesis import settings, seed, strategies as st
from property_tests.support import profiles
profiles.register()
settings.load_profile(sys.argv[1])
drawn = []
@profiles.holds(fast=10, x=st.integers())
def test_draws(x):
    drawn.append(x)
seed(int(sys.argv[2]))(test_draws)()
print(drawn)
"""
WORKLOADS = "from experiments.checking.work import draw; print(draw(5, 2048, seed=3))"


def run(code: str, *arguments: str, **variables: str) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "GITHUB_ACTIONS", "TF_BUILD")
    }
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    ).stdout


@pytest.mark.parametrize("profile", ["fast", "deep", "repeat"])
def test_seeds_draw_different_examples_whatever_ci_is(profile: str) -> None:
    first, second = (run(DRAW, profile, seed, CI="true") for seed in "12")
    assert first != second
    if profile == "repeat":
        assert first == run(DRAW, "repeat", "1")


def test_the_workloads_of_a_check_are_the_same_under_ci() -> None:
    assert run(WORKLOADS, CI="true") == run(WORKLOADS)


def test_properties_are_repeated_with_other_examples_each_time() -> None:
    drawn: list[int] = []

    def body(x: int) -> None:
        drawn.append(x)
        assert x < 2**40, "a large number"

    property_ = Property("small", body, {"x": st.integers(0, 2**41)}, 20)
    results = list(repeat.here([property_], range(1, 4)))
    assert [seed for seed, *_ in results] == [1, 2, 3]
    assert not all(passed for _, passed, *_ in results), "of 60 numbers half are too large"
    assert any("small: a large number" in output for *_, output in results)
    first = list(drawn)
    drawn.clear()
    list(repeat.here([property_], range(1, 4)))
    assert drawn == first
    drawn.clear()
    list(repeat.here([property_], range(4, 7)))
    assert drawn != first


def test_properties_to_repeat_are_chosen_by_name_or_file() -> None:
    names = [own.name for own in repeat.chosen(["a_right_engine_passes", "statistics"])]
    assert names[0] == "a_right_engine_passes"
    assert len(names) > 10
    with pytest.raises(ValueError, match=r"'gates' is no property and no file.*allowed: .*gate"):
        repeat.chosen(["gates"])
