"""`python -m reports audit`: published records hold, and no edit of them goes unseen."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments import workloads
from experiments.host.provenance import code_digest
from experiments.records import store
from reports.__main__ import app
from reports.audit import checks
from reports.audit.checks import CHECKS, Outcome, audit
from reports.audit.git_files import NotInGitError, code_digest_of
from reports.claims.published_studies import PUBLISHED, folders

SMALL = PUBLISHED / "cpu-two-cores" / "compare-vllm-06b"
"""Six launches of a clean commit."""


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a published folder. Its commit is taken as known, since a clone may be shallow."""
    recorded = lines_of(SMALL)[0]["provenance"]["code_digest"]
    monkeypatch.setattr(checks, "code_digest_of", lambda commit: recorded)
    return Path(shutil.copytree(SMALL, tmp_path / "copied"))


def lines_of(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / store.RECORDS).read_text().splitlines()]


def write_lines(folder: Path, lines: list[Any]) -> None:
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (folder / store.RECORDS).write_text(text)


def outcomes(folder: Path) -> dict[str, Outcome]:
    return {finding.check: finding.outcome for finding in audit(folder)}


def edits_a_record(kind: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        lines = lines_of(folder)
        change(next(line for line in lines if line["kind"] == kind))
        write_lines(folder, lines)

    return edit


def edits_the_plan(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """As someone would who knows the hashes: the plan and every record get the new one."""

    def edit(folder: Path) -> None:
        plan = json.loads((folder / store.PLAN).read_text())
        change(plan)
        plan["plan_hash"] = store.plan_hash(plan)
        (folder / store.PLAN).write_text(json.dumps(plan))
        write_lines(folder, [line | {"plan_hash": plan["plan_hash"]} for line in lines_of(folder)])

    return edit


def work_of(record: Any) -> Any:
    return next(iter(record["workloads"].values()))


def halves_the_times(record: Any) -> None:
    for work in record["workloads"].values():
        work["duration_s"] /= 2


def adds_a_line(folder: Path) -> None:
    with (folder / "report" / "report.md").open("a") as page:
        page.write("\nTwice as fast.\n")


def damages_a_line(folder: Path) -> None:
    text = (folder / store.RECORDS).read_text().splitlines()
    text[1] = text[1][: len(text[1]) // 2]
    (folder / store.RECORDS).write_text("\n".join(text) + "\n")


def shortens_prompts(plan: Any) -> None:
    planned = next(iter(plan["workloads"].values()))
    planned["params"]["prompt_tokens"] = [8, 8]


EDITS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a mismatch more": (
        "verdicts",
        edits_a_record("gate", lambda line: line.update(mismatches=line["mismatches"] + 900)),
    ),
    "a margin above its bound": (
        "verdicts",
        edits_a_record("gate", lambda line: line.update(max_margin=9.9)),
    ),
    "fewer tokens judged": (
        "verdicts",
        edits_a_record("gate", lambda line: line.update(tokens_checked=1)),
    ),
    "half the time": ("launches", edits_a_record("launch", halves_the_times)),
    "a token more": (
        "launches",
        edits_a_record("launch", lambda r: work_of(r).update(output_tokens=10**6)),
    ),
    "another seed": ("launches", edits_a_record("launch", lambda r: r.update(seed=1))),
    "other code": (
        "launches",
        edits_a_record("launch", lambda r: r["provenance"].update(code_digest="e" * 64)),
    ),
    "other work in the plan": ("workloads", edits_the_plan(shortens_prompts)),
    "a sentence on the page": ("page", adds_a_line),
    "a damaged line": ("complete", damages_a_line),
}


def test_what_is_published_holds(copied: Path) -> None:
    found = outcomes(copied)
    assert list(found) == ["workloads", *CHECKS]
    assert found.pop("tokens") is Outcome.UNKNOWN, "published before tokens were kept"
    assert set(found.values()) == {Outcome.HOLDS}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_breaks_the_check_that_is_for_it(copied: Path, edit: str) -> None:
    check, change = EDITS[edit]
    change(copied)
    assert outcomes(copied)[check] is Outcome.BROKEN
    told = CliRunner().invoke(app, ["audit", str(copied)])
    assert told.exit_code == 1
    assert f"{check:18} BROKEN" in told.output


def test_a_plan_that_was_edited_without_its_hash_ends_the_audit(copied: Path) -> None:
    text = (copied / store.PLAN).read_text()
    (copied / store.PLAN).write_text(text.replace('"alpha": 0.05', '"alpha": 0.5'))
    (finding,) = audit(copied)
    assert (finding.outcome, "the plan was edited" in finding.detail) == (Outcome.BROKEN, True)


def test_the_commit_must_hold_the_code_that_was_measured(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "code_digest_of", lambda commit: "d" * 64)
    assert outcomes(copied)["code"] is Outcome.BROKEN

    def shallow(commit: str) -> str:
        raise NotInGitError("this clone cannot read it")

    monkeypatch.setattr(checks, "code_digest_of", shallow)
    assert outcomes(copied)["code"] is Outcome.UNKNOWN


def with_tokens(folder: Path, change: Callable[[list[list[int]]], object]) -> None:
    """Gives every launch the same invented tokens, then changes what is kept of them."""
    lines = lines_of(folder)
    for record in lines:
        if record["kind"] == "launch":
            for work in record["workloads"].values():
                outputs = [[7] * work["output_tokens"]]
                work["tokens_digest"] = workloads.tokens_digest(outputs)
    write_lines(folder, lines)
    change(outputs)
    encoded = base64.b64encode(zlib.compress(json.dumps(outputs).encode())).decode()
    entry = {"digest": work["tokens_digest"], "tokens": encoded}
    (folder / store.TOKENS).write_text(json.dumps(entry) + "\n")


def test_tokens_that_were_kept_are_those_of_the_records(copied: Path) -> None:
    with_tokens(copied, lambda outputs: None)
    assert outcomes(copied)["tokens"] is Outcome.HOLDS
    with_tokens(copied, lambda outputs: outputs[0].__setitem__(0, 8))
    assert outcomes(copied)["tokens"] is Outcome.BROKEN


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["audit", str(tmp_path / "nothing")])
    assert told.exit_code == 2
    assert "there is no such folder" in told.output


def test_the_code_of_a_commit_is_read_as_its_checkout_is(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    source = tmp_path / "experiments" / "host" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text('_MEASURED_CODE = (\n    "src/nanovllm/**/*.py",\n)\n')
    engine = tmp_path / "src" / "nanovllm" / "engine"
    engine.mkdir(parents=True)
    (engine / "loop.py").write_text("step = 1\n")
    (engine / "notes.txt").write_text("not measured\n")
    git("add", "."), git("commit", "-qm", "one")
    first, patterns = git("rev-parse", "HEAD"), ("src/nanovllm/**/*.py",)
    clean = code_digest(tmp_path, patterns)
    (engine / "loop.py").write_text("step = 2\n")
    (engine / "notes.txt").write_text("still not measured\n")
    git("commit", "-qam", "two")
    assert code_digest_of(first, tmp_path) == clean
    assert code_digest_of("HEAD", tmp_path) == code_digest(tmp_path, patterns) != clean
    with pytest.raises(
        NotInGitError, match=r"cannot read commit 012345678901.*fetch the whole history"
    ):
        code_digest_of("0123456789012345678901234567890123456789", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders(), ids=lambda p: p.relative_to(PUBLISHED).as_posix())
def test_every_published_folder_holds(folder: Path) -> None:
    broken = [finding for finding in audit(folder) if finding.outcome is Outcome.BROKEN]
    assert not broken
