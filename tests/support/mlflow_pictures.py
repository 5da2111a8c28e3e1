"""python -m tests.support.mlflow_pictures: the pictures of MLflow in docs/quick-start.md, of a published study, as a
headless Chromium shows it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from experiments.host.provenance import ROOT
from experiments.records.store import read_for_report
from experiments.run import tracking
from reports.analysis.analyse import analyse
from reports.claims.published_studies import PUBLISHED
from reports.figures.browser import Browser
from reports.page.render import render
from tests.support.mlflow_ui import mlflow_ui

STUDY = "cpu-two-cores/ablate"
WIDTH = 1600
MOST_BYTES = 300_000


def import_published(name: str, root: Path) -> None:
    """Writes the runs of published records into the store of a folder."""
    plan, file = read_for_report(PUBLISHED / name)
    report = root / "reports" / name
    analysis = analyse(file.records, plan, file.notes)
    render(plan, file.records, analysis, report)
    (report / "analysis.json").write_text(json.dumps(analysis), encoding="utf-8")
    tracking.import_folder(PUBLISHED / name, report, root)


def close_assistant(browser: Browser, address: str) -> None:
    """MLflow's assistant opens by itself the first time, over a quarter of the window."""
    browser.open(f"{address}/#/experiments", WIDTH, 900)
    browser.wait_for("localStorage['mlflow.assistant.panelOpen_v1'] == 'true'")
    browser.evaluate("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
    browser.open("about:blank", WIDTH, 900)


def main(out: Path = ROOT / "docs") -> None:
    with tempfile.TemporaryDirectory() as aside:
        root = Path(aside)
        import_published(STUDY, root)
        with mlflow_ui(root) as address, Browser(timeout_s=120) as browser:
            close_assistant(browser, address)
            (link,) = tracking.links(root, address).values()
            browser.open(link, WIDTH, 740)
            browser.wait_for("document.querySelectorAll('.ag-row').length >= 20")
            pictures = {"mlflow.png": browser.picture()}
            browser.open("about:blank", WIDTH, 740)
            browser.open(f"{link}&compareRunsMode=CHART", WIDTH, 740, settle_s=3)
            browser.wait_for("document.querySelectorAll('.js-plotly-plot').length >= 3")
            browser.open("about:blank", WIDTH, 740)
            browser.open(f"{link}&compareRunsMode=CHART", WIDTH, 740, settle_s=8)
            # Plotly's tools, which a reader sees under the pointer only
            browser.evaluate(
                "document.querySelectorAll('.modebar').forEach(tools => tools.remove())"
            )
            pictures["mlflow-charts.png"] = browser.picture()
    for name, picture in pictures.items():
        if len(picture) > MOST_BYTES:
            sys.exit(f"{name}: {len(picture):,} bytes, more than {MOST_BYTES:,}")
        (out / name).write_bytes(picture)
        print(out / name)


if __name__ == "__main__":
    main()
