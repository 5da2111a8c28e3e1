"""docs/results.md lists every published study, each linked to its report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from experiments.records.store import read_for_report
from reports import text
from reports.analysis.analyse import analyse
from reports.claims import engines_compared, results_index
from reports.claims.published_studies import PUBLISHED, Library, folders
from reports.claims.short_answers import short_answer


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
        analysis={
            "answer": {
                "sentence": sentence,
                "by_workload": [{"workload": "", "sentence": sentence}],
            }
        },
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


def short(name: str) -> str:
    plan, file = read_for_report(PUBLISHED / name)
    return short_answer(analyse(file.records, plan, file.notes))


def test_an_answer_is_at_most_two_sentences() -> None:
    assert short("h200/ablate") == (
        "On mixed, everything on ×20.6 (16.6 to 25.6), faster; added last, cuda_graphs ×10.8, attention_backend ×4.68 "
        "and kernels ×3.57. On shared, everything on ×15.5 (11.2 to 21.3), faster; added last, attention_backend ×8.54, "
        "cuda_graphs ×6.65 and prefix_cache ×2.24."
    )
    assert short("h200/compare-vllm") == (
        "nanovllm over vLLM 0.33.0, everything on in both: mixed ×2.67 (2.24 to 3.18, faster), one-request ×2.48 "
        "(2.24 to 2.74, faster), shared-prefixes ×3.14 (2.41 to 4.10, faster)."
    )


def test_a_loss_is_told_as_what_the_switch_gains() -> None:
    assert short("h200/gpu-latency").startswith("one: cuda_graphs: ×13.8 (11.3 to 16.8); eight: ")
    assert "decode-8: tp2 ×0.713 (" in short("h200-x2/scaling"), "two ranks are not switched off"


def test_two_blocks_that_agree_show_that_they_do() -> None:
    """Their interval would read "0.344 to 0.344"."""
    low, high = text.interval(0.34378, 0.34412).split(" to ")
    assert (low, high) == ("0.3438", "0.3441")
    assert text.interval(0.344, 0.344) == "0.344 to 0.344"


def test_comparisons_with_engines_have_their_numbers_on_a_page() -> None:
    """Each row of docs/comparing-engines.md is that of the study's own report."""
    page = engines_compared.PAGE.read_text()
    table = page.split(engines_compared.BEGIN)[1].split(engines_compared.END)[0]
    rows = [line for line in table.splitlines() if "/report.md)" in line]
    assert len(rows) >= 17
    assert "vLLM 0.33.0 | 1 x NVIDIA H200, qwen3-0.6b in bfloat16 | mixed |" in table
    for name in ("h200/compare-vllm", "cpu-two-cores/compare-vllm"):
        own = [row.split(" | ") for row in rows if f"published/{name}/" in row]
        assert own
        report = (PUBLISHED / name / "report" / "report.md").read_text()
        for engine, _, workload, rate, bounds, verdict, _, _ in own:
            ratio, within = bounds.rstrip(")").split(" (")
            assert any(
                line.startswith(
                    f"| `{workload}` | all on / {engine.lstrip('| ')}, everything on in both | {rate} |"
                )
                and f"| {ratio} | {within} | {verdict} |" in line
                for line in report.splitlines()
            ), (name, engine, workload)
    (asked_later,) = (row for row in rows if "canonical, tp2 over vllm-tp2" in row)
    assert f"| {text.ABSENT} |" in asked_later


def test_a_page_without_a_place_for_its_table_is_an_error() -> None:
    assert text.put_between("a\n<b>\nold\n<e>\nz", "<b>", "<e>", "new") == "a\n<b>\n\nnew\n\n<e>\nz"
    with pytest.raises(ValueError, match="no place for the table: write <b> and <e>"):
        text.put_between("a", "<b>", "<e>", "new")


def test_the_committed_page_lists_every_published_study() -> None:
    page = results_index.PAGE.read_text()
    for folder in folders():
        assert f"published/{folder.relative_to(PUBLISHED).as_posix()}/report/report.md" in page
