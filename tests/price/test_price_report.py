"""A report prints the speed of a lossy configuration with its price, or not at all."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from experiments import workloads
from experiments.records.store import plan_hash
from reports.analysis.analyse import analyse
from reports.page.render import print_table, render
from tests.price.test_verdicts import MARGINS, study
from tests.support.synthetic import make_plan, make_records, one_at_a_time

LOSSY = "batching=continuous"
SPEEDUPS = {"prefix_cache": 1.0, "batching": 2.5, "tensor_parallel_size": 0.7}


def planned() -> Any:
    made = make_plan(one_at_a_time(reference=False), 4)
    prompts = {"num_requests": 64, "prompt_tokens": [33, 97]}
    made["price"] = {
        "margins": dict(MARGINS),
        "level": 0.05,
        "prompts": workloads.summarize(workloads.build("price.prompts", "random", prompts)),
        "cells": {LOSSY: {"batching": "continuous"}, "all": {"batching": "continuous"}},
    }
    return made | {"plan_hash": plan_hash({k: v for k, v in made.items() if k != "plan_hash"})}


def price_record(made: Any, cell: str, kl: float, **change: Any) -> Any:
    prompts = workloads.rebuild("price.prompts", made["price"]["prompts"])
    tokens = [len(r["prompt_token_ids"]) - 1 for wave in prompts["waves"] for r in wave]
    figures = study(3, kl=kl)
    scale = [n / was for n, was in zip(tokens, figures["tokens"], strict=True)]
    engine = {
        metric: [min(n, value * s) for value, s, n in zip(values, scale, tokens, strict=True)]
        for metric, values in figures["engine"].items()
    }
    quantiles = {"q50": kl / 2, "q99": 4 * kl, "q999": 9 * kl, "max": 12 * kl}
    return {
        "kind": "price",
        "schema": 1,
        "study": made["study"]["name"],
        "plan_hash": made["plan_hash"],
        "cell": cell,
        "levels": {"batching": "continuous"},
        "status": "ok",
        "reason": None,
        "fingerprint": made["price"]["prompts"]["fingerprint"],
        "dtype": "bfloat16",
        "reference_dtype": "float32",
        "requested": {},
        "resolved": {},
        "figures": {
            "prompts": {"tokens": tokens, "engine": engine, "floor": figures["floor"]},
            "engine_kl": quantiles,
            "floor_kl": dict.fromkeys(quantiles, 1e-4),
            "step_tokens": 16,
        },
        "code_digest": "a" * 64,
        "duration_s": 1.0,
        **change,
    }


@pytest.fixture
def plan() -> Any:
    return planned()


@pytest.fixture
def records(plan: Any) -> list[Any]:
    launches = make_records(plan, SPEEDUPS)
    return [*launches, price_record(plan, LOSSY, 0.004), price_record(plan, "all", 0.05)]


def shown(analysis: Any, *, verbose: bool = True) -> str:
    stream = io.StringIO()
    print_table(analysis, Console(file=stream, width=300), verbose=verbose)
    return stream.getvalue()


def test_the_price_is_judged_by_the_margins_of_the_plan(plan: Any, records: list[Any]) -> None:
    found = analyse(records, plan)["price"]
    assert {row["cell"]: row["verdict"] for row in found["rows"]} == {
        LOSSY: "within margin",
        "all": "outside",
    }
    assert found["unknown"] == {}


def test_every_name_of_a_lossy_configuration_says_its_price(plan: Any, records: list[Any]) -> None:
    analysis = analyse(records, plan)
    assert re.fullmatch(r"batching=continuous at 0\.00\d+ nats", analysis["shown"][LOSSY])
    assert re.fullmatch(r"all on at 0\.0\d+ nats", analysis["shown"]["all"])
    assert analysis["shown"]["baseline"] == "all off"
    for line in shown(analysis).splitlines():
        if "×2." in line:
            assert "nats" in line, line


def test_the_page_has_the_sentence_the_table_and_the_chart(
    plan: Any, records: list[Any], tmp_path: Path
) -> None:
    analysis = analyse(records, plan)
    markdown, html = render(plan, records, analysis, tmp_path)
    page = markdown.read_text()
    assert re.search(
        r"batching=continuous gives 2\.\d+ times the output tokens per second of all off on scaled "
        r"\(2\.\d+ to 2\.\d+\), at 0\.00\d+ nats per token \(95 % interval 0\.00\d+ to 0\.00\d+\), top choice "
        r"kept in 99\.\d % ",
        page.replace("\\", ""),
    ), page[:3000]
    assert "does not mean that its output is the same" in page
    assert "within margin" in page
    assert "How the prices were measured" in page
    assert (tmp_path / "figures" / "price.svg").exists()
    ElementTree.fromstring(html.read_text().removeprefix("<!DOCTYPE html>"))
    output = analysis["answer"]["output"]
    assert output.startswith("Output: NOT the same in every configuration, by intention.")
    assert "batching=continuous changes it: 0.00" in output


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "it was not measured"),
        ({"status": "error", "figures": None, "reason": "too little memory"}, "too little memory"),
        ({"fingerprint": "f" * 64}, "other prompts"),
        ({"code_digest": "b" * 64}, "other code"),
        ({"levels": {"batching": "chunked"}}, "the plan has"),
        ({"plan_hash": "0" * 64}, "it was not measured"),
    ],
)
def test_without_a_price_no_speed_is_shown(
    plan: Any, records: list[Any], tmp_path: Path, change: Any, why: str
) -> None:
    kept = [r for r in records if r["kind"] != "price" or r["cell"] != LOSSY]
    if change is not None:
        kept.append(price_record(plan, LOSSY, 0.004, **change))
    analysis = analyse(kept, plan)
    excluded = [row for row in analysis["excluded"] if row["cell"] == LOSSY]
    assert len(excluded) == 4
    assert all("its price is unknown" in row["reason"] and why in row["reason"] for row in excluded)
    effect = next(e for e in analysis["effects"] if e["cell"] == LOSSY)
    assert effect["n"] == 0
    assert "has no speed here, because its price is unknown" in analysis["answer"]["output"]
    render(plan, kept, analysis, tmp_path)
    # the other configurations are as they were
    assert next(e for e in analysis["effects"] if e["cell"] == "prefix_cache=on")["n"] == 4


@pytest.mark.parametrize(
    "edit",
    [
        lambda prompts: prompts["tokens"].pop(),
        lambda prompts: prompts["engine"]["kl"].__setitem__(0, -1.0),
        lambda prompts: prompts["engine"]["top_choice"].__setitem__(0, 1e6),
        lambda prompts: prompts["floor"].pop("log_perplexity"),
    ],
)
def test_figures_that_cannot_be_are_not_believed(plan: Any, records: list[Any], edit: Any) -> None:
    edited = copy.deepcopy(records)
    record = next(r for r in edited if r["kind"] == "price" and r["cell"] == LOSSY)
    edit(record["figures"]["prompts"])
    assert LOSSY in analyse(edited, plan)["price"]["unknown"]


def test_the_last_price_of_a_configuration_counts(plan: Any, records: list[Any]) -> None:
    again = [*records, price_record(plan, LOSSY, 0.08)]
    rows = {row["cell"]: row for row in analyse(again, plan)["price"]["rows"]}
    assert rows[LOSSY]["verdict"] == "outside"


def test_a_study_without_lossy_configurations_says_nothing_of_prices(tmp_path: Path) -> None:
    plain = make_plan(one_at_a_time(reference=False), 4)
    records = make_records(plain, SPEEDUPS)
    analysis = analyse(records, plain)
    assert "price" not in analysis
    markdown, _ = render(plain, records, analysis, tmp_path)
    assert "nats" not in markdown.read_text()
    assert analysis["answer"]["output"].startswith("Output: equivalent")
