"""`python -m experiments predict`: a table and a file, marked as predicted, in seconds and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import experiments.__main__ as cli
from experiments.prediction import cells, comparison, page
from experiments.prediction.comparison import Compared, compare, kendall, summary
from experiments.prediction.step_time import NAMES, read_fitted
from experiments.records import store
from tests.prediction.plans import plan_of

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "reports" / "published"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["predict", *arguments])


def test_cells_with_intervals_ratios_and_parts(tmp_path: Path) -> None:
    out = tmp_path / "predicted.json"
    done = invoke("--study", "gpu-ablate", "--profile", "h100", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert "predicted, not measured: gpu-ablate on h100" in done.output
    assert "not predicted: hf: only nanovllm's own steps are modelled" in done.output
    said = json.loads(out.read_text())
    assert said["evidence"] == "predicted"
    rows = {(row["cell"], row["workload"]): row for row in said["cells"]}
    assert {"baseline", "all", "cuda_graphs=on"} <= {cell for cell, _ in rows}
    for row in rows.values():
        assert row["evidence"] == "predicted"
        assert 0 < row["low"] < row["output_tokens_per_s"] < row["high"]
        assert sum(row["parts"].values()) >= row["duration_s"] * 0.99
    everything = rows["all", "mixed"]
    assert everything["ratio_low"] < everything["ratio_to_baseline"] < everything["ratio_high"]
    assert everything["ratio_to_baseline"] > 2
    assert rows["baseline", "mixed"]["ratio_to_baseline"] is None
    twin, base = (rows[name, "mixed"]["output_tokens_per_s"] for name in ("aa", "baseline"))
    assert twin == base


def test_a_faster_card_is_predicted_to_be_faster() -> None:
    rates = {}
    for profile in ("rtx4070-laptop", "rtx4070", "h200"):
        done = invoke("--study", "gpu-8gb", "--profile", profile)
        assert done.exit_code == 0, done.output
        line = next(line for line in done.output.splitlines() if line.startswith("baseline "))
        rates[profile] = float(line.split()[1].replace(",", ""))
    assert rates["rtx4070-laptop"] < rates["rtx4070"] < rates["h200"]


def test_requests_over_time_are_predicted_and_searches_are_named(tmp_path: Path) -> None:
    out = tmp_path / "predicted.json"
    done = invoke("--study", "gpu-online", "--profile", "h100", "--json", str(out))
    assert done.exit_code == 0, done.output
    said = json.loads(out.read_text())
    assert {"cell": "workload sustainable", "reason": "it searches for a rate"} in said[
        "not_predicted"
    ]
    assert said["cells"]
    assert all(row["ttft_p50_s"] > 0 for row in said["cells"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--study", "embedded", "--profile", "cpu"), "give the profile of a GPU"),
        (("--study", "gpu-canonical", "--profile", "rtx4070"), "lower it"),
        (("--study", "gpu-abblate", "--profile", "h100"), "gpu-ablate"),
    ],
)
def test_what_cannot_be_predicted_is_one_message(arguments: tuple[str, ...], said: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


def test_canonical_takes_less_than_ten_seconds_and_no_torch() -> None:
    code = (
        "import sys, time; from typer.testing import CliRunner; import experiments.__main__ as cli\n"
        "done = CliRunner().invoke(cli.app, 'predict --study gpu-batching --profile h200'.split())\n"
        "print(done.output, time.process_time())\n"
        "sys.exit(done.exit_code or ('torch' in sys.modules and 3))"
    )
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code + "\n"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *shown, cpu_s = done.stdout.split()
    print(f"{cpu_s} s of CPU for three configurations of canonical, imports included")
    assert "baseline" in shown
    assert float(cpu_s) < 20


@pytest.mark.parametrize("profile", ["rtx4070-laptop", "rtx4070"])
def test_the_predictions_beside_the_claims_are_those_of_today(profile: str, tmp_path: Path) -> None:
    out = tmp_path / "predicted.json"
    done = invoke("--study", "gpu-8gb", "--profile", profile, "--json", str(out))
    assert done.exit_code == 0, done.output
    kept = comparison.REGISTERED.with_name("claimed") / f"{profile}.json"
    assert json.loads(out.read_text()) == json.loads(kept.read_text())


def test_unknown_levels_are_named_and_not_predicted() -> None:
    cell: Any = plan_of({"kernels": "compile", "attention_backend": "torch"})["cells"]["cell"]
    assert "no published records" in str(cells.why_not(cell))
    cell["engine"] = "hf"
    assert "hf" in str(cells.why_not(cell))


def test_the_coefficients_are_complete_and_positive() -> None:
    fitted = read_fitted()
    assert all(getattr(fitted.coefficients, name) > 0 for name in NAMES)
    assert fitted.t >= 1.645
    assert fitted.fitted_on
    assert not [s for s in fitted.fitted_on if "h100" in s]


REGISTERED = sorted(comparison.REGISTERED.glob("*.json"))


@pytest.mark.parametrize("file", REGISTERED, ids=lambda file: file.stem)
def test_a_registered_prediction_is_of_a_published_plan(file: Path) -> None:
    said = json.loads(file.read_text())
    machine, _, study = file.stem.partition("-")
    plan = store.read_plan(PUBLISHED / machine / study / store.PLAN)
    assert said["plan_hash"] == plan["plan_hash"]
    assert said["evidence"] == "predicted"
    assert {row["cell"] for row in said["cells"]} | {
        row["cell"] for row in said["not_predicted"]
    } == set(plan["cells"])


def test_the_page_holds_what_records_and_predictions_say() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "python -m experiments.prediction page"


def test_another_plans_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compare it with the study"):
        compare(REGISTERED[0], PUBLISHED / "h200" / "ablate")


def _row(predicted: float, measured: float, cell: str = "x") -> Compared:
    return Compared(
        cell,
        "w",
        predicted,
        predicted * 0.9,
        predicted * 1.1,
        measured,
        measured,
        measured,
        0.5,
        1.0,
        1.0,
        0.0,
        0.0,
    )


def test_the_summary_counts_misses() -> None:
    rows = [_row(100, 100, "baseline"), _row(130, 100), _row(104, 100)]
    said = summary(rows)
    assert said["cells"] == 3
    assert said["worst_error"] == pytest.approx(0.3)
    assert said["within_10"] == said["inside"] == pytest.approx(2 / 3)
    assert said["median_error"] == pytest.approx(0.04)


def test_rank_agreement_of_the_same_and_of_the_reverse_order() -> None:
    rows = [_row(1, 10), _row(2, 20), _row(3, 30)]
    assert kendall(rows) == 1
    assert kendall([_row(1, 30), _row(2, 20), _row(3, 10)]) == -1
