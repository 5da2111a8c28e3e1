"""The code of docs/pandas.md runs, and finds what the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nanovllm import __version__
from tests.docs.pages import ROOT, blocks


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


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load(Path(ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["title"] == "nanovllm"
    assert {"cff-version", "message", "authors", "license"} <= set(citation)
