"""Designs against the textbook, their size against their budget, and the rules that make a launch
invalid.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.host import provenance, telemetry
from experiments.host.validity import objections
from experiments.launch.runner import Runner
from experiments.records import store
from experiments.study import block_count, designs
from reports.statistics.intervals import t_interval
from tests.support.fake_engine import make_plan

LETTERS = "ABCDEFG"
OFF = {"a": "off", "b": "off", "c": "static"}
LEVELS: dict[str, list[Any]] = {"a": ["on"], "b": ["on"], "c": ["continuous", "chunked"]}


def made(kind: designs.Kind, levels: dict[str, list[Any]] = LEVELS) -> dict[str, str]:
    return {name: role for name, (role, _) in designs.cells(kind, OFF, levels, {}).items()}


def test_the_cells_of_each_design() -> None:
    alone = ["a=on", "b=on", "c=continuous", "c=chunked"]
    but_one = ["all-but-a", "all-but-b", "all-but-c"]
    assert list(made("one_at_a_time")) == alone
    assert list(made("add_one_in")) == [*alone, "all"]
    assert list(made("leave_one_out")) == but_one
    assert list(made("both")) == [*alone, "all", *but_one]
    assert made("listed") == {}
    full = designs.cells("full_factorial", OFF, LEVELS, {})
    assert len(full) == 2 * 2 * 3 - 1
    assert full["all"] == ("all", {"a": "on", "b": "on", "c": "chunked"}), (
        "a factor's last level is that of everything on"
    )
    assert full["a=on+c=continuous"] == ("treatment", {"a": "on", "b": "off", "c": "continuous"})


def test_leave_one_out_refers_to_everything_on() -> None:
    assert designs.reference("leave_one_out", OFF, LEVELS) == (
        "all",
        {"a": "on", "b": "on", "c": "chunked"},
    )
    assert designs.reference("both", OFF, LEVELS) == ("baseline", OFF)
    assert designs.cells("leave_one_out", OFF, LEVELS, {})["all-but-c"] == (
        "treatment",
        {"a": "on", "b": "on", "c": "static"},
    )


def test_no_configuration_runs_twice_but_the_reference() -> None:
    two = {"a": ["on"], "b": ["on"]}
    assert list(made("both", two)) == ["a=on", "b=on", "all"], (
        "with two factors, all but a is b alone"
    )
    for kind in designs.Kind.__args__:  # type: ignore[attr-defined]
        for levels in (LEVELS, two, {"a": ["on"]}, {**LEVELS, "b": []}):
            generators = {"c": ["a", "b"]} if kind == "fractional_factorial" else {}
            if generators and any(len(levels.get(factor, [])) != 1 for factor in "abc"):
                continue
            points = [point for _, point in designs.cells(kind, OFF, levels, generators).values()]
            points.append(designs.reference(kind, OFF, levels)[1])
            assert len({tuple(sorted(point.items())) for point in points}) == len(points)


def test_what_needs_a_factor_is_left_out_with_it() -> None:
    off, levels = {**OFF, "d": "off"}, {"a": ["on"], "b": ["on"], "c": ["chunked"], "d": ["on"]}

    def can_run(point: designs.Levels) -> bool:
        return point["b"] == "off" or point["a"] == "on"  # b needs a

    found = designs.cells("both", off, levels, {}, can_run=can_run)
    assert found["all-but-a"][1] == {"a": "off", "b": "off", "c": "chunked", "d": "on"}
    assert found["all-but-b"][1] == {"a": "on", "b": "off", "c": "chunked", "d": "on"}
    assert found["b=on"][1] == {"a": "off", "b": "on", "c": "static", "d": "off"}, (
        "the plan says why it cannot run"
    )


def test_a_factor_apart_is_alone_and_on_top_of_everything_on() -> None:
    levels: dict[str, list[Any]] = {"a": ["on"], "b": ["on"], "ranks": [2, 4], "sum": ["fast"]}
    off = {"a": "off", "b": "off", "ranks": 1, "sum": "plain"}

    def can_run(point: designs.Levels) -> bool:
        return point["sum"] == "plain" or point["ranks"] != 1

    found = designs.cells("both", off, levels, {}, apart=("ranks", "sum"), can_run=can_run)
    assert found["all"][1] == {"a": "on", "b": "on", "ranks": 1, "sum": "plain"}
    on_top = {name for name in found if name.startswith("all+")}
    assert on_top == {"all+ranks=2", "all+ranks=4", "all+ranks=2+sum=fast"}
    assert {"ranks=2", "ranks=4", "sum=fast"} <= set(found)
    assert "all-but-ranks" not in found
    assert designs.reference("leave_one_out", off, levels, ("ranks", "sum"))[1] == found["all"][1]


@pytest.mark.parametrize(
    # Box, Hunter and Hunter, table of minimum-aberration fractions
    ("factors", "least", "runs", "resolution", "shortest"),
    [
        (4, 4, 8, 4, 1),
        (5, 4, 16, 5, 1),
        (6, 4, 16, 4, 3),
        (7, 4, 16, 4, 7),
        (5, 3, 8, 3, 2),
        (6, 3, 8, 3, 4),
        (7, 3, 8, 3, 7),
        (3, 3, 4, 3, 1),
        (6, 5, 32, 6, 1),
        (7, 5, 64, 7, 1),
    ],
)
def test_chosen_fractions_are_those_of_the_textbook(
    factors: int, least: int, runs: int, resolution: int, shortest: int
) -> None:
    names = list(LETTERS[:factors])
    generators = designs.choose_generators(names, least)
    words = designs.defining_words(generators)
    assert len(designs.fraction(names, generators)) == runs
    assert designs.resolution(generators) == resolution
    assert sum(len(word) == resolution for word in words) == shortest
    assert len(words) == 2 ** len(generators) - 1


@pytest.mark.parametrize("factors", [3, 4, 5, 6, 7])
def test_a_fraction_is_balanced_and_its_aliases_are_its_own(factors: int) -> None:
    """Checked on the columns themselves: aliased effects have the same column (or its negative),
    others are orthogonal.
    """
    names = list(LETTERS[:factors])
    generators = designs.choose_generators(names, 3 if factors == 3 else 4)
    runs = designs.fraction(names, generators)
    assert runs[0] == frozenset(), "everything off is part of it"

    def column(effect: frozenset[str]) -> np.ndarray:
        return np.array([(-1) ** len(effect - on) for on in runs])

    groups = designs.alias_groups(names, generators)
    assert sum(map(len, groups)) == factors + math.comb(factors, 2)
    for index, group in enumerate(groups):
        head = column(group[0][1])
        assert head.sum() == 0
        for sign, effect in group:
            assert (sign * column(effect) == head).all()
        for other in groups[index + 1 :]:
            assert head @ column(other[0][1]) == 0


def test_what_a_fraction_mixes_is_said() -> None:
    names = ["kernels", "cuda_graphs", "overlap", "batching"]
    generators = designs.choose_generators(names, 4)
    assert generators == {"batching": ["kernels", "cuda_graphs", "overlap"]}
    assert designs.say_aliases(names, generators)[0] == "kernels*cuda_graphs + overlap*batching"
    assert designs.say_aliases(list("ABCDE"), designs.choose_generators(list("ABCDE"), 5)) == []
    with pytest.raises(
        ValueError,
        match=r"3 factors have no fraction of resolution 4; use kind: full_factorial \(8 cells\)",
    ):
        designs.choose_generators(names[:3], 4)


# -------------------------------------------------------------------------------------------------
# size


def test_blocks_follow_the_budget() -> None:
    assert block_count.blocks_within(None, None, False, 5, 10) == block_count.DEFAULT_BLOCKS
    assert block_count.blocks_within(9, None, False, 5, 10) == 9
    assert block_count.blocks_within(None, 600, False, 5, 10) == 12
    assert block_count.blocks_within(None, 1e9, False, 5, 10) == block_count.MAX_BLOCKS
    assert block_count.blocks_within(4, 600, False, 5, 10) == 4


@pytest.mark.parametrize(
    ("blocks", "budget_s", "bootstrap", "message"),
    [
        (
            None,
            90,
            False,
            r"budget_s: 2 blocks of 5 cells at 10 s per launch take 100 s, but 90 s are enough for 1. Raise it to 100 s",
        ),
        (None, 40, False, r"but 40 s are enough for none"),
        (
            9,
            300,
            False,
            r"9 blocks .* take 450 s, but 300 s are enough for 6. Raise it to 450 s, or set design.blocks to 2 to 6",
        ),
        (
            None,
            250,
            True,
            r"6 blocks .* take 300 s, but 250 s are enough for 5. Raise it to 300 s, or use fewer cells .the minimum is 6 blocks.",
        ),
    ],
)
def test_a_budget_that_is_too_small_says_what_fits(
    blocks: int | None, budget_s: float, bootstrap: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        block_count.blocks_within(blocks, budget_s, bootstrap, 5, 10)


def test_an_earlier_run_tells_what_will_be_found(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "model", blocks=4)
    folder = tmp_path / "run"
    folder.mkdir()
    store.write_plan(plan, folder / store.PLAN)
    shifts = [0.0, 0.02, 0.04, 0.06]
    with (folder / store.RECORDS).open("w") as file:
        for entry in plan["launches"]:
            log_s = shifts[entry["block"]] if entry["cell"] != "baseline" else 0.0
            work = {"a": {"output_tokens": 10, "duration_s": math.exp(log_s + entry["block"])}}
            record = {
                "kind": "launch",
                "schema": store.SCHEMA,
                "launch": entry["launch"],
                "attempt": 1,
                "status": "ok",
                "workloads": work,
            }
            file.write(
                json.dumps({**record, "block": entry["block"], "cell": entry["cell"]}) + "\n"
            )
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    found = block_count.previous_noise(plan, [damaged, folder])
    assert found is not None
    assert found[0] == pytest.approx(np.std(shifts, ddof=1))
    other = {**plan, "study": {**plan["study"], "name": "other"}}
    assert block_count.previous_noise(other, [folder]) is None
    assert block_count.detectable(0.03, 6, 0.05) == pytest.approx(0.045, abs=0.003)
    assert block_count.detectable(0.03, 24, 0.05) < block_count.detectable(0.03, 6, 0.05) / 2
    # An interval reaches as far as the report's does: beyond the mean, by the same factor on both sides.
    sample = np.array([0.01, 0.05, 0.02, 0.08])
    low, high = t_interval(sample, 0.05)
    reach = block_count.half_width(float(sample.std(ddof=1)), 4, 0.05)
    assert reach == pytest.approx(np.expm1((high - low) / 2))
    assert block_count.half_width(0.03, 1, 0.05) == np.inf
    # What it claims is what studies of normal noise find, at small levels as well, where
    # statsmodels' solver had no solution.
    for alpha, blocks, power in ((0.05, 6, 0.8), (0.01, 2, 0.8), (0.001, 4, 0.8), (0.001, 7, 0.9)):
        shifted = np.random.default_rng(0).normal(
            block_count.detectable_in_sd(blocks, alpha, power), 1, (100_000, blocks)
        )
        found = stats.ttest_1samp(shifted, 0, axis=1).pvalue < alpha
        assert found.mean() == pytest.approx(power, abs=0.01)


# -------------------------------------------------------------------------------------------------
# validity

RULES = {"foreign_gpu_processes": 0, "throttle": ["hw_thermal"], "max_foreign_cpu": 0.8}


@pytest.mark.parametrize(
    ("seen", "reasons"),
    [
        ({}, []),
        (
            {"foreign_gpu_pids": [7, 8]},
            ["2 other processes used its GPUs (7, 8); allowed: 0"],
        ),
        ({"throttle_reasons": ["power_cap"]}, []),
        ({"throttle_reasons": ["hw_thermal", "power_cap"]}, ["a GPU was throttled (hw_thermal)"]),
        ({"summary": {"cpu_foreign": {"mean": 0.5}}}, []),
        (
            {"summary": {"cpu_foreign": {"mean": 0.91}}},
            ["other processes used 91% of the CPU; allowed: 80%"],
        ),
    ],
)
def test_rules_fixed_beforehand_mark_a_launch_invalid(
    seen: dict[str, Any], reasons: list[str]
) -> None:
    found = {"foreign_gpu_pids": [], "throttle_reasons": [], "summary": {}, **seen}
    assert objections(found, RULES) == reasons
    assert objections(found, None) == [], "plans of an older version had no rules"


def test_an_invalid_launch_is_kept_with_its_reason_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some other process is always running for an instant: a limit of next to nothing makes every
    launch invalid.
    """
    # so often that a short launch has samples
    monkeypatch.setattr(telemetry, "Sampler", partial(telemetry.Sampler, interval_s=0.05))
    plan = make_plan(tmp_path / "model", blocks=1, seconds=0.05)
    plan["study"]["validity"] = {**RULES, "max_foreign_cpu": -1.0}
    plan["plan_hash"] = store.plan_hash(plan)
    with Runner(plan, tmp_path / "run", resume=False) as runner:
        runner.run()
        assert runner.pending() == []
    found = store.read(tmp_path / "run")
    assert [record["status"] for record in found] == ["invalid"] * 3
    assert all("of the CPU; allowed" in record["reason"] for record in found)
    assert all(record["workloads"] for record in found), "what was measured is kept"
    assert store.counted(found) == []


def test_the_environment_report_is_written_once_and_named_in_each_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = provenance.collect_env(sys.executable, tmp_path)
    assert name is not None
    assert "PyTorch version" in (tmp_path / name).read_text()
    assert provenance.collect_env(sys.executable, tmp_path) == name
    assert len(list(tmp_path.iterdir())) == 1
    assert provenance.collect_env("/bin/false", tmp_path) is None


def test_an_environment_report_that_a_full_disk_cut_short_is_said_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = "PyTorch version: as told\n" * 1000
    monkeypatch.setattr(provenance, "environment_report", lambda python: printed)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            store.RecordError,
            match=r"environment-.*txt: cannot be written .*Free some disk space",
        ):
            provenance.collect_env(sys.executable, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    name = provenance.collect_env(sys.executable, tmp_path)
    assert name is not None
    assert (tmp_path / name).read_text() == printed
