"""The code of docs/pandas.md runs, also as a notebook, and finds what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from nanovllm import __version__
from tests.docs.pages import ROOT, blocks
from tests.support import notebook


@pytest.fixture(scope="module")
def computed() -> dict[str, Any]:
    """The variables of the page's blocks, run one after the other as in a notebook."""
    variables: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for code in blocks("docs/pandas.md", "python"):
            exec(compile(code, "docs/pandas.md", "exec"), variables)
    return variables


def test_every_counted_launch_is_in_the_frame(computed: dict[str, Any]) -> None:
    counts = computed["analysis"]["counts"]
    launches = computed["launches"]
    assert len(launches) == counts["counted_launches"] * launches["workload"].nunique()
    assert (launches["output_tokens_per_s"] > 0).all()


def test_speedups_are_those_of_the_report(computed: dict[str, Any]) -> None:
    effects = computed["effects"].dropna(subset=["ratio"])
    shown = 0
    for effect in effects.itertuples():
        if effect.workload in computed["speedups"].columns:
            found = computed["speedups"].loc[effect.cell, effect.workload]
            assert found == pytest.approx(effect.ratio), (effect.cell, effect.workload)
            shown += 1
    assert shown >= 10


def test_the_notebook_is_the_page_and_runs(
    computed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = notebook.NOTEBOOK.read_text(encoding="utf-8")
    page = notebook.PAGE.read_text(encoding="utf-8")
    assert written == notebook.notebook(page), "write it again: python -m tests.support.notebook"
    monkeypatch.chdir(ROOT / "docs")
    variables: dict[str, Any] = {}
    for cell in json.loads(written)["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "docs/records.ipynb", "exec"), variables)
    pd.testing.assert_frame_equal(variables["effects"], computed["effects"])


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load(Path(ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["title"] == "nanovllm"
    assert {"cff-version", "message", "authors", "license"} <= set(citation)
