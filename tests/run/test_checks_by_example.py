"""The consistency checks of a launch, at their limits; most of these had mutants that survived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.records import merged_folders
from experiments.records.store import Folder, read_for_report
from reports.analysis import consistency
from reports.analysis.gate_and_launches import run_order
from reports.statistics.contrasts import Lattice
from reports.statistics.intervals import Rule, bootstrap_interval

PUBLISHED = Path(__file__).parents[2] / "reports" / "published" / "h200" / "compare-vllm"


def served(**changes: Any) -> Any:
    return {
        "fingerprint": "f",
        "num_requests": 2,
        "prompt_tokens": 10,
        "output_tokens": 8,
        "finish_reasons": {"length": 2},
        "duration_s": 1.0,
        "request_times_s": [[0.0, 0.1, 0.9]] * 2,
        "step_times_s": [],
        **changes,
    }


PLANNED = {"fingerprint": "f", "num_requests": 2, "prompt_tokens": 10, "output_tokens": 8}
COUNTERS = {
    "prefill_tokens": 10,
    "prefix_hit_tokens": 0,
    "preemptions": 0,
    "admissions": 2,
    "steps": 5,
}


def checks(work: Any) -> dict[str, bool]:
    return {c.name: c.ok for c in consistency.check_workload("w", work, PLANNED, {})}


@pytest.mark.parametrize(
    ("tokens", "stopped", "fine"),
    [(8, 0, True), (7, 0, False), (7, 1, True), (8, 1, True), (9, 1, False), (0, 1, False)],
)
def test_output_tokens(tokens: int, stopped: int, fine: bool) -> None:
    reasons = {"length": 2 - stopped, "stop": stopped}
    work = served(output_tokens=tokens, finish_reasons=reasons)
    assert checks(work)["output tokens"] == fine


def test_an_engine_that_counts_what_is_needed_and_no_more_is_checked() -> None:
    name = "prompt tokens are computed or found"
    assert {c.name: c.ok for c in consistency._check_counters(served(counters=COUNTERS))}[name]
    less = COUNTERS | {"prefill_tokens": 9}
    assert not {c.name: c.ok for c in consistency._check_counters(served(counters=less))}[name]
    del less["steps"]
    assert not list(consistency._check_counters(served(counters=less)))


@pytest.mark.parametrize(("limit", "fine"), [(4, True), (3, False), (2, False)])
def test_as_many_requests_run_at_once_as_may(limit: int, fine: bool) -> None:
    """Arrival, first and last token of four requests that decode for two seconds each, in two."""
    times = np.array([[0.0, 1.0, 3.0]] * 4)
    (check,) = consistency._check_concurrency(times, 2.0, {"max_num_seqs": limit})
    assert check.ok == fine
    edge = np.array([[0.0, 1.0, 3.0 + consistency.CLOCK_RELATIVE]] * 4)  # half of what is allowed
    assert all(c.ok for c in consistency._check_concurrency(edge, 2.0, {"max_num_seqs": 4}))


def test_a_level_is_between_0_and_1() -> None:
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="alpha"):
            Rule(alpha=alpha)


def test_a_bootstrap_of_equal_values_is_a_point_and_of_a_range_of_one_is_not() -> None:
    assert bootstrap_interval(np.array([2.0, 2.0, 2.0]), 0.05, "seed") == (2.0, 2.0)
    low, high = bootstrap_interval(np.array([0.0, 1.0, 0.5, 0.25]), 0.05, "seed")
    assert low < high


def test_a_folder_of_records_knows_its_path_and_is_made_with_its_parents(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "c"
    folder = Folder(place)
    assert folder.path == place
    assert place.is_dir()


def test_cells_of_other_engines_are_no_points_of_the_lattice() -> None:
    def cell(role: str, engine: str, **levels: Any) -> dict[str, Any]:
        return {"role": role, "engine": engine, "levels": levels}

    cells = {
        "baseline": cell("baseline", "nanovllm", x=False),
        "other": cell("all", "vllm", x=True),
        "x": cell("all", "nanovllm", x=True),
    }
    lattice = Lattice(cells)  # type: ignore[arg-type]
    assert sorted(lattice.cell.values()) == ["baseline", "x"]


def test_the_order_of_launches_names_the_telemetry_that_was_recorded() -> None:
    class Counted:
        launches = [
            {
                "launch": "a", "block": 0, "order": 0, "cell": "c", "started_at": "t",
                "telemetry": {"summary": {"cpu_mhz": {"mean": 1.0}, "cpu_busy": {"mean": None}}},
            }
        ]  # fmt: skip

    assert run_order(Counted(), {})["telemetry_series"] == ["cpu_mhz"]  # type: ignore[arg-type]


def test_an_error_of_the_gate_never_comes_after_its_verdict() -> None:
    """Whatever else the records hold: the last one counts."""
    verdict = {"kind": "gate", "status": "pass", "note": "a"}
    error = {"kind": "gate", "status": "error", "note": "b"}
    merged, _ = merged_folders.combine({"launches": []}, [[verdict], [error]])  # type: ignore[arg-type, list-item]
    assert [record["status"] for record in merged] == ["error", "pass"]  # type: ignore[typeddict-item]


def test_folders_of_one_plan_are_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {"a": "p", "b": "q", "c": "p"}
    monkeypatch.setattr(
        merged_folders.store, "read_plan", lambda path: {"plan_hash": plans[path.parent.name]}
    )
    folders = [Path(name) for name in plans]
    assert [folder.name for folder in merged_folders.of_one_plan(folders)] == ["a", "c"]


def test_plan_and_records_are_read_for_a_report() -> None:
    plan, records = read_for_report(PUBLISHED)
    assert plan["plan_hash"]
    assert {record["kind"] for record in records.records} >= {"launch", "gate"}


@pytest.mark.parametrize(("more", "fine"), [(0.0, True), (0.9, True), (3.0, False)])
def test_decodes_take_no_longer_than_requests_decode(more: float, fine: bool) -> None:
    """One request that decodes for 100 s, in steps that sum up to as much; more: of the relative
    tolerance.
    """
    residence_s = 100.0
    step_s = residence_s * (1 + more * consistency.CLOCK_RELATIVE)
    times = np.array([[0.0, 0.0, residence_s]])
    work = served(step_times_s=[[step_s, 0, 1]], num_requests=1, output_tokens=2)
    found = {c.name: c.ok for c in consistency._check_steps(work, times, 200.0, 0.0)}
    assert found["Little's law: decode integral <= residence"] == fine
