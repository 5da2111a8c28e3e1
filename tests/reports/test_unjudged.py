"""Launches that no reference can judge are shown as measured and concluded from in no way; ratios
asked for afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments.records.store import read_for_report
from reports.__main__ import app
from reports.analysis.analyse import analyse, ratios
from reports.claims.measurements import scaling
from reports.claims.publish import publish
from reports.claims.published_studies import PUBLISHED, Library, library
from reports.page.render import render

FOLDER = PUBLISHED / "h200-x2" / "scaling-8b"
TWO = PUBLISHED / "h200-x2" / "scaling"


def without_verdicts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] != "gate"]


def test_every_launch_is_shown_and_none_counts() -> None:
    plan, file = read_for_report(FOLDER)
    analysis = analyse(file.records, plan)
    assert analysis["counts"]["counted_launches"] == 0
    assert all(effect["ratio"] is None for effect in analysis["effects"])
    rows = {(row["workload"], row["cell"]): row for row in analysis["unjudged"]}
    assert set(rows) == {
        (workload, cell) for workload in plan["workloads"] for cell in plan["cells"]
    }
    for (workload, cell), row in rows.items():
        rates = sorted(
            r["workloads"][workload]["output_tokens"] / r["workloads"][workload]["duration_s"]
            for r in file.records
            if r["kind"] == "launch" and r["cell"] == cell
        )
        assert (row["n"], row["least"], row["median"], row["most"]) == (3, *rates)
        assert (row["step_s"] is None) == (cell == "dp2"), "replicas record no steps"
    assert analysis["answer"]["sentence"].startswith("Descriptive: 15 launches")


def test_its_head_says_what_ran_and_that_nothing_was_judged(tmp_path: Path) -> None:
    plan, file = read_for_report(FOLDER)
    analysis = analyse(file.records, plan)
    head = render(plan, file.records, analysis, tmp_path)[0].read_text().split("## Evidence")[0]
    for line in (
        "launches: 15 run to the end of 15, none counted; 3 of 3 blocks run to the end",
        "gate: not judged: descriptive",
    ):
        assert f"- {line}\n" in head
    assert "## Descriptive: measured, not judged" in head
    assert "Incomplete" not in head
    lost = plan["launches"][0]["launch"]
    left = [record for record in file.records if record.get("launch") != lost]
    assert (
        "Incomplete: 1 of 3 blocks did not run to the end."
        in analyse(left, plan)["answer"]["caveats"]
    )


def test_published_it_says_that_no_gate_judged_it(tmp_path: Path) -> None:
    says = (publish(FOLDER, "here/descriptive", "make x", tmp_path) / "README.md").read_text()
    assert "No gate judged the outputs" in says
    assert "which the gate judged" not in says
    assert (
        "which the gate judged"
        in (publish(TWO, "here/judged", "make x", tmp_path) / "README.md").read_text()
    )


def test_one_verdict_ends_the_exception() -> None:
    plan, file = read_for_report(FOLDER)
    launch = next(record for record in file.records if record["kind"] == "launch")
    verdict = {
        "kind": "gate",
        "plan_hash": plan["plan_hash"],
        "workload": "decode-8",
        "is_negative_control": False,
        "tokens_digest": launch["workloads"]["decode-8"]["tokens_digest"],
        "status": "fail",
        "reason": "wrong",
    }
    gated = next(record for record in read_for_report(TWO)[1].records if record["kind"] == "gate")
    analysis = analyse([*file.records, gated | verdict], plan)
    assert analysis["unjudged"] == []
    assert analysis["answer"]["sentence"].startswith("No answer")


def test_a_model_that_can_be_judged_is_never_shown_so() -> None:
    plan, file = read_for_report(TWO)
    analysis = analyse(without_verdicts(file.records), plan)
    assert analysis["counts"]["counted_launches"] == 0
    assert analysis["unjudged"] == []


def test_a_ratio_asked_for_afterwards_is_that_of_the_report() -> None:
    plan, file = read_for_report(TWO)
    effects = {
        e["workload"]: e
        for e in analyse(file.records, plan)["effects"]
        if e["cell"] == "tp2" and e["metric"] == "output_tokens_per_s"
    }
    found = {
        effect["workload"]: effect
        for effect in ratios(file.records, plan, "tp2", plan_baseline(plan))
    }
    assert found.keys() == effects.keys()
    for workload, effect in found.items():
        assert (effect["ratio"], effect["n"]) == (
            pytest.approx(effects[workload]["ratio"]),
            effects[workload]["n"],
        )
    turned = {
        effect["workload"]: effect
        for effect in ratios(file.records, plan, plan_baseline(plan), "tp2")
    }
    assert turned["canonical"]["ratio"] == pytest.approx(1 / found["canonical"]["ratio"])
    assert ratios(without_verdicts(file.records), plan, "tp2", "vllm-tp2") == [], (
        "nothing counts without the gate"
    )


def plan_baseline(plan: dict[str, Any]) -> str:
    return next(name for name, cell in plan["cells"].items() if cell["role"] == "baseline")


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["ratio", str(TWO), "tp2", "vllm-tp2"])
    assert done.exit_code == 0
    assert "asked after the study ran, so no verdict" in done.output
    assert "canonical" in done.output
    wrong = CliRunner().invoke(app, ["ratio", str(TWO), "tp2", "vllm"])
    assert wrong.exit_code == 2
    assert "'vllm' is no cell of this study; it has baseline" in wrong.output


def test_what_is_modelled_says_so_and_decides_nothing() -> None:
    shelf = library()
    found = list(scaling(shelf, 8, "h200-x2/notes/all-reduce.json"))
    assert {finding.source for finding in found} == {
        "h200-x2/scaling",
        "h200-x2/scaling-8b",
        "h200-x2/scaling-32b",
    }
    for finding in found:
        assert finding.what.startswith("MODEL, not measured")
        assert (finding.low, finding.high, finding.decides) == (None, None, False)
        assert finding.modelled
        assert 0 < finding.value < 1
        assert ("outputs not judged" in finding.evidence) == (finding.source != "h200-x2/scaling")
    assert list(scaling(shelf, 8)) == []
    assert list(scaling(Library(shelf.studies, {}), 8, "h200-x2/notes/all-reduce.json")) == []


def test_faster_sums_are_expected_to_scale_further() -> None:
    shelf, name = library(), "h200-x2/notes/all-reduce.json"
    slower = json.loads(json.dumps(shelf.results[name]))
    for row in slower["rows"]:
        if row["kind"] == "one_shot":
            row["graph_us"] *= 3
    before = [f.value for f in scaling(shelf, 8, name) if "library on two" in f.what]
    after = [
        f.value
        for f in scaling(Library(shelf.studies, {name: slower}), 8, name)
        if "library on two" in f.what
    ]
    assert len(before) == len(after) > 0
    assert all(b > a for b, a in zip(before, after, strict=True))
