"""Where CI is set, Hypothesis derandomizes whatever does not say otherwise: fifty repetitions would
be one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert run(DRAW, "repeat", "1", CI="true") == run(DRAW, "repeat", "1")


def test_the_workloads_of_a_check_are_the_same_under_ci() -> None:
    assert run(WORKLOADS, CI="true") == run(WORKLOADS)
