"""MLflow's own pages in a headless Chromium: what helped, by how much, and is the output the same?"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.run import tracking
from experiments.run.mlflow_view import in_a_column
from reports import text
from reports.figures.browser import Browser, find
from tests.support.mlflow_pictures import close_assistant, import_published
from tests.support.mlflow_ui import mlflow_ui

# CI sets it: there, a missing browser is a failure
REQUIRED = bool(os.environ.get("NANOVLLM_REQUIRE_CHROMIUM"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find() is None and not REQUIRED,
        reason="no Chromium on this machine: apt-get install chromium",
    ),
    # MLflow and alembic deprecate things of their own
    pytest.mark.filterwarnings("ignore"),
]
ONE, OTHER = "cpu-two-cores/embedded", "cpu-two-cores/conversation"


@pytest.fixture(scope="module")
def analyses() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, analyses: dict[str, Any]) -> Path:
    """A store with two published studies."""
    root = tmp_path_factory.mktemp("mlflow")
    for name in (ONE, OTHER):
        import_published(name, root)
        analyses[name] = json.loads((root / "reports" / name / "analysis.json").read_text())
    shutil.rmtree(root / "reports")
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with mlflow_ui(root) as address:
        yield address


@pytest.fixture
def browser() -> Iterator[Browser]:
    """With an empty profile, as of somebody who opens MLflow for the first time."""
    with Browser(timeout_s=60) as browser:
        yield browser


TABLE = """[...document.querySelectorAll('.ag-row')].reduce((rows, row) => {
  const found = rows[row.getAttribute('row-index')] ||= {};
  row.querySelectorAll('[col-id]').forEach(cell => found[cell.getAttribute('col-id')] = cell.textContent.trim());
  return rows;
}, {})"""
"""{number of the row: {column: text}} of the runs table, whose columns lie in two lists of rows."""

CUT = """[...document.querySelectorAll('[col-id^="tags."], [col-id^="metrics."]')].flatMap(cell => {
    const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), found = [];
    for (let node; node = texts.nextNode();) {
      if (!node.data.trim()) continue;
      const words = document.createRange();
      words.selectNodeContents(node);
      const end = words.getBoundingClientRect().right;
      for (let box = node.parentElement; box && cell.contains(box); box = box.parentElement)
        if (getComputedStyle(box).overflowX != 'visible' && box.getBoundingClientRect().right < end - 8)
          found.push(node.data.trim());
    }
    return found;
  })"""
"""What the runs table shows cut by more than a letter (8 px), in headers and cells."""

CHARTS = """[...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data || [])
  .filter(bars => bars.type == 'bar').map(bars => [bars.metrics[0].key, bars.names, Array.from(bars.x)])"""
"""[metric, names of its bars, their lengths] of each chart of MLflow's that is drawn so far."""


def test_the_table_answers_what_helped_by_how_much_and_whether_it_is_the_same(
    browser: Browser, root: Path, address: str, analyses: dict[str, Any]
) -> None:
    """All of it in the window of a desk: columns outside of it are not drawn."""
    close_assistant(browser, address)
    browser.open(tracking.links(root, address)["embedded"], 1600, 900)
    browser.wait_for("document.querySelectorAll('.ag-row').length >= 16")
    rows = [
        row for _, row in sorted(browser.evaluate(TABLE).items(), key=lambda item: int(item[0]))
    ]
    cells = analyses[ONE]["by_cell"].values()
    assert len(rows) == len(cells)
    for cell in cells:
        (row,) = (row for row in rows if row["attributes.`Run Name`"].endswith(cell["shown"]))
        for workload in ("scaled", "shared"):
            for kind in ("speedup", "as_last"):
                value = cell["metrics"].get(f"{workload}/{kind}")
                shown = row[f"metrics.`{workload}/{kind}`"]
                if value is None:
                    assert shown == "-"
                else:
                    assert float(shown) == float(text.ratio(value)[1:])
                assert len(shown) <= 5, "no digits that nobody reads"
            said = in_a_column(cell["verdicts"].get(workload)) or "-"
            assert row[f"tags.`{workload}/verdict`"] == said
        assert row["tags.`gate`"] == cell["gate"]
    assert browser.evaluate(CUT) == [], "headers and values are readable as they stand"
    longer = "document.querySelectorAll('.ag-row [col-id=\"tags.`gate`\"] *')"
    browser.evaluate(
        f"[...{longer}].filter(e => !e.children.length)[0].textContent = 'pass '.repeat(9)"
    )
    assert set(browser.evaluate(CUT)) == {("pass " * 9).strip()}, "the guard guarded"
    fastest_first = sorted(
        cells, key=lambda cell: -cell["metrics"].get("all workloads/speedup", -math.inf)
    )
    for row, cell in zip(rows, fastest_first, strict=True):
        assert row["attributes.`Run Name`"].endswith(cell["shown"])


def test_the_charts_are_speedups_by_optimization(
    browser: Browser, root: Path, address: str, analyses: dict[str, Any]
) -> None:
    """As MLflow draws them by itself, behind the chart icon of the table."""
    link = tracking.links(root, address)["embedded"] + "&compareRunsMode=CHART"
    browser.open(link, 1600, 3600)  # what lies outside of the window is not drawn
    charts = drawn(browser, "shared/speedup")
    cells = analyses[ONE]["by_cell"].values()
    for workload in ("scaled", "shared"):
        names, lengths = charts[f"{workload}/speedup"]
        assert dict(zip(names, lengths, strict=True)) == pytest.approx(
            {
                cell["shown"]: cell["metrics"][f"{workload}/speedup"]
                for cell in cells
                if f"{workload}/speedup" in cell["metrics"]
            },
            abs=0.005,
        )


def test_two_studies_are_compared(
    browser: Browser, root: Path, address: str, analyses: dict[str, Any]
) -> None:
    link = tracking.comparison(root, address)
    assert link is not None
    browser.open(link, 1600, 1400)
    metric = "all workloads/speedup"
    names, lengths = drawn(browser, metric)[metric]
    speedups = [
        (cell["shown"], cell["metrics"][metric])
        for name in (ONE, OTHER)
        for cell in analyses[name]["by_cell"].values()
        if metric in cell["metrics"]
    ]
    expected = sorted(speedups, key=lambda pair: -pair[1])[: len(names)]
    assert len(names) >= 8
    assert sorted(lengths, reverse=True) == pytest.approx(
        [value for _, value in expected], abs=0.005
    )
    assert {"all on", "cached"} <= set(names), "the best of each study"
    assert browser.evaluate("document.body.innerText.includes('Runs from 2 Experiments')")


def test_an_experiment_opens_on_its_runs_once_mlflow_is_in_its_training_mode(
    browser: Browser, address: str
) -> None:
    """As docs/quick-start.md says; and without it, on an overview of traces."""
    browser.open(f"{address}/#/experiments/1", 1600, 900)
    browser.wait_for("location.href.includes('/overview')")
    browser.wait_for(f"{MODE}.length == 1")
    browser.evaluate(f"{MODE}[0].click()")
    browser.open("about:blank", 1600, 900)
    browser.open(f"{address}/#/experiments/1", 1600, 900)
    browser.wait_for("location.href.includes('/experiments/1/runs')")


def test_the_report_is_shown_among_the_artifacts(
    browser: Browser, root: Path, address: str
) -> None:
    client = tracking._client(root)
    (study,) = client.search_runs(["1"], "tags.role = 'study'")
    page = f"experiments/1/runs/{study.info.run_id}/artifacts/report/report.html"
    browser.open(f"{address}/#/{page}", 1600, 900)
    browser.wait_for("document.querySelector('iframe')?.src.startsWith('blob:')")
    # the frame is sandboxed, and its content out of reach; what it was made from is not
    shown = browser.call(
        "Runtime.evaluate",
        expression="fetch(document.querySelector('iframe').src).then(answer => answer.text())",
        awaitPromise=True,
        returnByValue=True,
    )["result"]["value"]
    assert "gives 3.49 times the output tokens per second of all off" in shown
    assert shown.count("<svg") >= 8


MODE = "[...document.querySelectorAll('[role=button]')].filter(one => one.innerText.trim() == 'Model training')"


def drawn(browser: Browser, metric: str) -> dict[str, tuple[list[str], list[float]]]:
    """{metric: (names, lengths)} of the charts, once that of `metric` is drawn."""
    browser.wait_for(f"{CHARTS}.some(([name]) => name == '{metric}')")
    return {name: (names, lengths) for name, names, lengths in browser.evaluate(CHARTS)}
