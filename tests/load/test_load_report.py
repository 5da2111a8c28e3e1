"""A study under load from records to its page: planted speeds, on a queue that is computed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import workloads
from experiments.load.arrivals import scaled
from experiments.load.delivered import pack
from experiments.records.store import plan_hash
from experiments.run import mlflow_view
from reports import text
from reports.analysis.analyse import analyse
from reports.analysis.noise import rounding
from reports.figures.load_curves import curves, pareto
from reports.page.load_sections import latency_summary
from reports.page.render import render
from reports.page.table import print_table
from reports.statistics.intervals import Rule, estimate
from reports.statistics.under_load import Transient
from tests.docs.pages import ABBREVIATIONS, unexplained
from tests.support.synthetic import make_plan, make_records, one_at_a_time

RULES = {
    "slo": {"ttft_s": 0.3},
    "slo_name": None,
    "attainment": 0.9,
    "max_lateness_s": 0.01,
    "min_delivered": 0.98,
}
SPEEDUPS = {"prefix_cache": 1.0, "batching": 2.0, "tensor_parallel_size": 1.0}
SERVICE_S = 0.08
"""Of a request of the baseline, on one server."""


def plan_under_load(blocks: int = 4, **study: Any) -> Any:
    plan = make_plan(one_at_a_time(reference=False), blocks, **study)
    sizes = {"num_requests": 80, "prompt_tokens": 8, "output_tokens": 12}
    rates: dict[str, Any] = {"rate-4": {"rate": 4}, "rate-11": {"rate": 11}}
    rates["searched"] = {"search": {"low": 2, "high": 50}}
    built = {
        name: workloads.build(
            name, "random", {**sizes, "arrivals": {"process": "poisson", **given}}
        )
        for name, given in rates.items()
    }
    plan["workloads"] = {name: workloads.summarize(work) for name, work in built.items()}
    plan["study"] |= {"metric": "goodput_requests_per_s", "load": dict(RULES), **study}
    for launch in plan["launches"]:
        launch["workload_order"] = list(rates)
    del plan["plan_hash"]
    return plan | {"plan_hash": plan_hash(plan)}


def records_under_load(plan: Any) -> list[Any]:
    """Every launch serves its requests in order, in times that the speeds planted in its record give."""
    records: list[Any] = make_records(plan, SPEEDUPS, sd=0.01)
    for record in records:
        if record["kind"] != "launch":
            continue
        record["telemetry"]["samples"] = [
            {"time_s": n / 2, "gpus": [{"watts": 200.0}]} for n in range(120)
        ]
        for name, work in record["workloads"].items():
            built = workloads.rebuild(name, plan["workloads"][name])
            service_s = SERVICE_S * work["duration_s"]
            rate = 0.8 / service_s
            schedule = built["arrivals"]
            if name == "searched":
                schedule = scaled(schedule, rate)
            free, times = 0.0, []
            for due in schedule["offset_s"]:
                free = max(free, due) + service_s
                times.append([due, free - service_s / 2, free])
            gap_s = service_s / 24
            work |= {
                "duration_s": free,
                "request_times_s": times,
                "window_s": [1.0, 1.0 + free],
                "load": {
                    "asked_rate": schedule["rate"],
                    "delivered": 1.0,
                    "never_sent": 0,
                    "sent_s": [due for due, *_ in times],
                    "lateness_p50_s": 0.0,
                    "lateness_p99_s": 0.001,
                    "lateness_max_s": 0.002,
                    "token_gaps_us": pack([[n * gap_s for n in range(12)]] * len(times)),
                },
            }
            if name == "searched":
                work["load"]["search"] = {
                    "rate": rate,
                    "failed": 1.1 * rate,
                    "stopped": "within",
                    "trials": [{"rate": 2.0, "passed": True}] * 5,
                }
        record["total_s"] = 200.0
    return records


@pytest.fixture(scope="module")
def study() -> tuple[Any, list[Any], Any]:
    plan = plan_under_load()
    records = records_under_load(plan)
    return plan, records, analyse(records, plan)


def effect(analysis: Any, metric: str, workload: str, cell: str) -> Any:
    (found,) = (
        each
        for each in analysis["effects"]
        if (each["metric"], each["workload"], each["cell"]) == (metric, workload, cell)
    )
    return found


def test_planted_speeds_are_found_under_load(study: Any) -> None:
    _, _, analysis = study
    assert analysis["counts"]["excluded_launches"] == 0
    fast = effect(analysis, "sustainable_requests_per_s", "searched", "batching=continuous")
    assert fast["verdict"] == "faster"
    assert fast["ratio"] == pytest.approx(2.0, rel=0.05)
    # the search knows a rate to within 10 %: no interval is narrower than that allows
    assert fast["high"] / fast["low"] > 1.1
    # far below what either can serve, goodput is what arrives
    slow_rate = effect(analysis, "goodput_requests_per_s", "rate-4", "batching=continuous")
    assert slow_rate["verdict"] == "equivalent"
    near = effect(analysis, "time_to_first_token_p90_s", "rate-11", "batching=continuous")
    assert near["verdict"] == "faster"
    twin = effect(analysis, "sustainable_requests_per_s", "searched", "baseline-again")
    assert twin["verdict"] in ("equivalent", "inconclusive")


def test_equal_counts_in_a_few_blocks_are_no_proof() -> None:
    """Goodput counts requests: two blocks may well agree to the last digit, and still be noisy."""
    blocks = {0: math.log(1.02), 1: math.log(1.02)}
    bare = estimate(blocks, Rule(), "x")
    assert bare["low"] == bare["high"]
    found = estimate(blocks, Rule(), "x", least_sd=1 / 45 / math.sqrt(6))
    assert found["low"] is not None
    assert found["p"] is not None
    assert found["low"] < 1 < 1.02 < found["high"]
    assert found["p"] > 0.05
    noisy = {0: 0.1, 1: -0.2, 2: 0.3}
    assert estimate(noisy, Rule(), "x") == estimate(noisy, Rule(), "x", least_sd=0.01)
    rules = rounding(plan_under_load(2), {"rate-4": Transient(8, True)})
    assert rules["goodput_requests_per_s", "rate-4"] == pytest.approx(1 / 72 / math.sqrt(6))
    assert rules["sustainable_requests_per_s", "searched"] == pytest.approx(
        math.log(1.1) / math.sqrt(6)
    )


def test_a_row_for_each_rate_and_cell(study: Any) -> None:
    plan, _, analysis = study
    rows = {(row["workload"], row["cell"]): row for row in analysis["load"]["rows"]}
    assert len(rows) == 3 * len(plan["cells"])
    fast, slow = (rows["rate-11", cell] for cell in ("batching=continuous", "baseline"))
    assert fast["attained"] == 1.0 > slow["attained"]
    assert fast["offered"] == pytest.approx(11, rel=0.3)
    slow_rows = [row for row in analysis["load"]["rows"] if row["workload"] == "rate-11"]
    assert {row["cut"] for row in slow_rows} == {fast["cut"]}  # all on the same requests
    assert (fast["requests"], fast["kept"]) == (80, 80 - fast["cut"])
    assert 0 <= fast["cut"] <= 40
    gap = fast["quantiles"]["inter_token_latency"]["50"]
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert fast["quantiles"]["time_to_first_token"]["99"]["within"]["needed"] == 368
    assert fast["quantiles"]["time_to_first_token"]["99"]["within"]["low"] is None
    (found,) = (row for row in analysis["load"]["found"] if row["cell"] == "baseline")
    assert found["low"] <= 10 <= found["high"]
    json.dumps(analysis, allow_nan=False)


def test_the_page_shows_latencies_a_verdict_and_a_curve(study: Any, tmp_path: Path) -> None:
    plan, records, analysis = study
    markdown, html = render(plan, records, analysis, tmp_path)
    page = markdown.read_text()
    for words in (
        "## Under load",
        "Sustainable rate, relative to",
        "Goodput on rate-11, relative to",
        "Latency at each rate",
        "Not claimed: ",
        "p99 needs 368 independent samples a launch",
        "poisson, 11 per second",
        "J per output token",
        "figures/curves.svg",
        "figures/pareto.svg",
    ):
        assert words in page, words
    assert {name for name in ABBREVIATIONS if name in page} == set(ABBREVIATIONS)
    assert unexplained(page) == []
    assert unexplained("The SLO is kept.") == ["SLO"]
    assert "curves-wide" in html.read_text()
    for name in ("curves", "pareto"):
        assert (tmp_path / "figures" / f"{name}.svg").stat().st_size > 2000


def test_every_latency_axis_has_labels(study: Any) -> None:
    """Also where all latencies lie within one power of ten."""
    _, _, analysis = study
    for draw in (curves, pareto):
        for width in (360, 720):
            figure = draw(analysis, width)
            assert figure is not None
            panels = [axes for axes in figure.axes if axes.get_xlabel()]
            assert len(panels) >= 2
            for axes in panels:
                low, high = axes.get_ylim()
                labels = [
                    axes.yaxis.get_major_formatter()(tick)
                    for tick in axes.get_yticks()
                    if low <= tick <= high
                ]
                assert len(labels) >= 2, axes.get_title(loc="left")
                assert all(label.endswith("s") for label in labels)


def test_the_terminal_answers_what_is_sustained_and_what_happens_to_the_gaps(study: Any) -> None:
    plan, _, analysis = study
    out = Console(record=True, width=80)
    print_table(analysis, out)
    shown = out.export_text()
    said = " ".join(shown.split())
    assert (
        "the highest rate at which 90 % of requests meet the service level objective (SLO)" in said
    )
    assert "rate-4 (poisson, 4 per second), rate-11 (poisson, 11 per second)" in said
    found = {row["cell"]: row for row in analysis["load"]["found"]}
    rate = text.number(found["batching=continuous"]["mean"])
    assert f"batching=continuous {rate} (" in said
    gap = effect(analysis, "inter_token_latency_p99_s", "rate-11", "batching=continuous")
    assert gap["verdict"] == "faster"
    cost = effect(analysis, "output_tokens_per_s", "rate-11", "batching=continuous")
    assert "inter-token latency (ITL) p99 relative to all off: " in said
    assert f"batching=continuous {text.ratio(gap['ratio'])} (" in said
    assert f"with {text.ratio(cost['ratio'])} (" in said
    assert "goodput relative to all off" in said
    assert "* too few samples" in said
    latencies = shown[shown.index("latency on rate-11") :].split("\n\n")[0].splitlines()
    assert len(latencies) == 1 + len(plan["cells"]) + 1, "a row each, and what * means"
    assert "TTFT p90" in latencies[0]
    assert any(line.endswith(rate) for line in latencies)
    assert len(shown.splitlines()) <= 60


def test_a_search_that_found_no_rate_says_so(study: Any) -> None:
    plan, records, _ = study
    broken = copy.deepcopy(records)
    for record in broken:
        if record["kind"] == "launch" and record["cell"] == "baseline":
            search = record["workloads"]["searched"]["load"]["search"]
            search |= {"rate": None, "failed": 2.0, "stopped": "low failed"}
            search["trials"] = [{"rate": 2.0, "passed": False}]
    analysis = analyse(broken, plan)
    (part,) = (p for p in analysis["answer"]["by_workload"] if p["workload"] == "searched")
    assert part["sentence"].endswith("all off below 2.000 in 4 of 4 launches.")
    summary = latency_summary(analysis)
    assert summary is not None
    assert summary[2][0][-1] == "below 2.000"
    searches = [
        record["workloads"]["searched"]["load"]["search"]
        for record in broken
        if record["kind"] == "launch" and record["cell"] == "baseline"
    ]
    searches[0] |= {"rate": 2.0, "failed": 2.2, "stopped": "within"}
    summary = latency_summary(analyse(broken, plan))
    assert summary is not None
    assert summary[2][0][-1] == "below 2.000 in 3 of 4"


def test_mlflow_gets_the_curves(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, records, analysis = study
    monkeypatch.setattr(mlflow_view, "hardware", lambda record: "a CPU")  # not in these records
    plan = {**plan, "study": {**plan["study"], "factors": {}}}
    view = mlflow_view.cell_view(plan, "baseline", records, analysis)
    curve = [point for point in view.metrics if point.key.startswith("curve/ttft_p90_s")]
    assert len(curve) == 2
    assert curve[0].step < curve[1].step
    assert curve[0].value < curve[1].value  # it waits longer at the higher rate
    keys = {point.key for point in view.metrics}
    assert "searched/sustainable_requests_per_s" in keys
    launch = next(record for record in records if record["kind"] == "launch")
    details = mlflow_view.launch_view(plan, launch, records).details
    assert "token_gaps_us" not in details["workloads"]["rate-4"]["load"]


def test_a_launch_whose_generator_was_late_is_excluded(study: Any) -> None:
    plan, records, _ = study
    broken = copy.deepcopy(records)
    broken[0]["workloads"]["rate-4"]["load"]["lateness_p99_s"] = 0.5
    (row,) = analyse(broken, plan)["excluded"]
    assert "disturbed: the load generator was late by 0.5000 s" in row["reason"]


def test_without_power_the_page_says_so(study: Any, tmp_path: Path) -> None:
    plan, records, _ = study
    dark = copy.deepcopy(records)
    for record in dark:
        if record["kind"] == "launch":
            record["telemetry"]["samples"] = []
    markdown, _ = render(plan, dark, analyse(dark, plan), tmp_path)
    assert "No power was sampled" in markdown.read_text()
