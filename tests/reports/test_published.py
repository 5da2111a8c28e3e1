"""What is committed under reports/published and in docs is what its records say, byte for byte:
`make report` changes nothing. HTML pages are not committed (docs/adr/0011).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.records.store import RecordError
from reports.__main__ import LINES, app, write_claims, write_questions
from reports.claims import claims, engines_compared, questions, results_index
from reports.claims import published_studies as shelf
from reports.claims.publish import publish
from reports.claims.published_studies import PUBLISHED, Study, folders, library
from tests.docs.pages import unexplained
from tests.support.synthetic import make_plan, make_records, one_at_a_time

STUDIES = {folder.relative_to(PUBLISHED).as_posix(): folder for folder in folders()}


@pytest.fixture(scope="module", params=sorted(STUDIES))
def study(request: pytest.FixtureRequest) -> Study:
    return library().studies[request.param]


def test_a_published_report_is_what_its_records_give(
    study: Study, rendered: Callable[[str], Path]
) -> None:
    folder = rendered(study.name)
    fresh = {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    committed = study.folder / "report"
    there = {
        path.relative_to(committed): path.read_bytes()
        for path in committed.rglob("*")
        if path.is_file()
    }
    # what `experiments import` and `make report` leave there; git does not keep them
    for name in ("analysis.json", "report.html"):
        there.pop(Path(name), None)
    assert fresh.pop(Path("report.html")).startswith(b"<!DOCTYPE html>")
    assert fresh.keys() == there.keys()
    stale = [str(path) for path in fresh if fresh[path] != there[path]]
    assert not stale, "render again with: make report"


@pytest.mark.parametrize(
    ("write", "page"),
    [
        (write_claims, claims.PAGE),
        (write_questions, questions.PAGE),
        (lambda out: results_index.write(out, library()), results_index.PAGE),
        (lambda out: engines_compared.write(out, library()), engines_compared.PAGE),
    ],
)
def test_pages_made_from_all_records_are_current(write: object, page: Path, tmp_path: Path) -> None:
    write(tmp_path)  # type: ignore[operator]
    fresh = tmp_path / page.relative_to(claims.ROOT)
    assert fresh.read_text() == page.read_text(), "render again with: make report"


def test_records_are_published_with_nothing_of_the_machine_they_were_made_on(study: Study) -> None:
    """Folders are written relative to the clone; what was counted passed the gate. Only what no
    gate can judge is there without.
    """
    assert not re.search(r'"/(home|work|Users)/', (study.folder / "records.jsonl").read_text())
    descriptive = study.name in ("h200-x2/scaling-8b", "h200-x2/scaling-32b")
    assert bool(study.analysis["unjudged"]) == descriptive
    assert bool(study.analysis["gate"]["rows"]) != descriptive
    assert bool(study.analysis["counts"]["counted_launches"]) != descriptive


def test_no_page_is_kept_that_one_renamed_word_rewrites() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", str(PUBLISHED)],
        cwd=claims.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode or not tracked.stdout:
        pytest.skip("no git repository")
    kept = tracked.stdout.split()
    assert not [path for path in kept if path.endswith(".html")]
    assert sum(path.endswith("/report/report.md") for path in kept) == len(STUDIES)


def test_what_the_questions_point_to_exists() -> None:
    pointed = questions.paths()
    assert len(pointed) > 12
    assert not [path for path in pointed if not (claims.ROOT / path).exists()]


def test_the_count_of_our_lines_is_that_of_this_tree(tiny: Path, tmp_path: Path) -> None:
    """To 2 %: a page need not change with each line. Counted without vLLM, its last count stays,
    with its date.
    """
    recorded, again = json.loads(LINES.read_text()), tmp_path / "lines.json"
    again.write_text(LINES.read_text())
    assert (
        CliRunner().invoke(app, ["lines", "--model", str(tiny), "--out", str(again)]).exit_code == 0
    )
    fresh = json.loads(again.read_text())
    for part in ("core", "everything_on", "package"):
        counted = fresh["nanovllm"][part]["lines"]
        refresh = "count again with: python -m reports lines --model FOLDER; and then: make report"
        assert recorded["nanovllm"][part]["lines"] == pytest.approx(counted, rel=0.02), (
            f"{part}: {refresh}"
        )
    assert fresh["vllm"] == {"made_at": recorded["made_at"], **recorded["vllm"]}


def test_the_check_says_which_page_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "PAGE", tmp_path / "docs" / "claims.md")
    monkeypatch.setattr(shelf, "folders", lambda root=PUBLISHED: [])
    shelf.library.cache_clear()
    try:
        stale = CliRunner().invoke(app, ["claims", "--check"])
        assert stale.exit_code == 1
        assert "not current: docs/claims.md" in stale.stderr
        assert CliRunner().invoke(app, ["claims"]).exit_code == 0
        assert CliRunner().invoke(app, ["claims", "--check"]).exit_code == 0
    finally:
        shelf.library.cache_clear()


def test_publishing_keeps_what_is_needed_and_leaves_the_machine_behind(tmp_path: Path) -> None:
    plan = make_plan(one_at_a_time(reference=False), 2)
    made = make_records(plan, {})
    made[0]["provenance"]["executable"] = f"{claims.ROOT}/.venv/bin/python"
    lines = [json.dumps(record) + "\n" for record in made]
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "records.jsonl").write_text("".join(lines))
    (run / "tokens.jsonl").write_text("of every launch")
    kept = tmp_path / "published"
    target = publish(run, "here/it", "make ablate STUDY=x", kept)
    files = {"plan.json", "records.jsonl", "README.md"}
    assert {path.name for path in target.iterdir()} == files | {"tokens.jsonl"}
    assert "audit --judge" in (target / "README.md").read_text()
    (run / "tokens.jsonl").write_text("x" * 1_000_001)
    large = publish(run, "here/large", "make ablate STUDY=x", kept)
    assert {path.name for path in large.iterdir()} == files
    assert "too\nlarge to be kept" in (large / "README.md").read_text()
    assert (
        json.loads((target / "records.jsonl").read_text().splitlines()[0])["provenance"][
            "executable"
        ]
        == "./.venv/bin/python"
    )
    assert "make ablate STUDY=x" in (target / "README.md").read_text()
    assert library(kept).studies["here/it"].analysis["counts"]["counted_launches"] == len(
        plan["launches"]
    )
    (target / "README.md").write_text("my own words")
    publish(run, "here/it", "make ablate STUDY=x", kept)  # again, and grown, is the same folder
    assert (target / "README.md").read_text() == "my own words"
    (run / "records.jsonl").write_text("".join(lines[2:]))
    with pytest.raises(RecordError, match="holds other records"):
        publish(run, "here/it", "make ablate STUDY=x", kept)
    for name in ("../elsewhere", "/tmp/elsewhere", ""):
        with pytest.raises(RecordError, match="give a place under published/"):
            publish(run, name, "make ablate STUDY=x", kept)
    (run / "records.jsonl").write_text(lines[0])
    with pytest.raises(RecordError, match="No answer: not one launch was counted"):
        publish(run, "here/nothing", "make ablate STUDY=x", kept)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_each_number_of_tests_says_of_which_question(name: str) -> None:
    page = (STUDIES[name] / "report" / "report.md").read_text(encoding="utf-8")
    for counts in re.findall(r"Tests of each question: (.*?)\. The fewer", page):
        for count in counts.split(", "):
            assert re.fullmatch(r"([a-z][\w ]+|A/A twin): \d+", count), counts


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_abbreviations_are_explained_where_they_first_stand(name: str) -> None:
    page = (STUDIES[name] / "report" / "report.md").read_text(encoding="utf-8")
    assert unexplained(page) == []
