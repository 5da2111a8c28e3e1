"""docs/results.md lists every published study, each linked to its report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from reports.claims import results_index
from reports.claims.published_studies import PUBLISHED, Library, folders


def study(name: str, date: str, hardware: str, sentence: str) -> Any:
    return SimpleNamespace(
        name=name,
        hardware=hardware,
        plan={
            "study": {"title": f"About {name}"},
            "model": {"preset": "tiny", "path": None, "dtype": "float32"},
        },
        records=[
            {"kind": "launch", "started_at": f"{date}T12:00:00Z"},
            {"kind": "launch", "started_at": "2099-01-01T00:00:00Z"},
            {"kind": "gate"},
        ],
        analysis={"answer": {"sentence": sentence}},
    )


def test_a_row_has_study_date_model_answer_and_link() -> None:
    found = [
        study("here/old", "2026-01-02", "a CPU", "It is slower | a bit."),
        study("here/new", "2026-03-04", "a CPU", "It is faster."),
        study("there/x", "2026-02-03", "2 x GPU", "Nobody knows."),
    ]
    page = results_index.page(Library({one.name: one for one in found}, {}))
    assert page.index("## 2 x GPU") < page.index("## a CPU")
    assert page.index("About here/new") < page.index("About here/old"), "the newest first"
    assert (
        "| [About here/new](../reports/published/here/new/report/report.md) | 2026-03-04 "
        "| tiny, float32 | It is faster. |"
    ) in page
    assert "It is slower \\| a bit." in page


def test_the_committed_page_lists_every_published_study() -> None:
    page = results_index.PAGE.read_text()
    for folder in folders():
        assert f"published/{folder.relative_to(PUBLISHED).as_posix()}/report/report.md" in page
