"""docs/walkthrough.md follows a study, a verdict, a check and a claim through files and functions
that exist.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
SECTIONS = dict(
    section.split("\n", 1) for section in re.split(r"(?m)^## One ", PAGE)[1:]
)  # "study": its rows
ROW = re.compile(r"(?m)^\| [^|]*\| `([^`]+)` \| (.+) \|$")
FILE_NAME = re.compile(r"`(\w+\.(?:py|j2|css|md\.j2|html\.j2))`")
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`")
NOT_OF_THE_FILE = {
    "gate_record",
    "report.md",
    "report.html",
    "check.json",
    "measurement.preload",
}
"""Names in code spans that are not functions of the row's file."""


def rows(section: str) -> list[tuple[str, str]]:
    return ROW.findall(section)


def room(path: str) -> str:
    return str(Path(path).parent)


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a module."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{part.name}"
                for part in node.body
                if isinstance(part, ast.FunctionDef)
            }
    return found


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_file_on_the_way_exists(section: str) -> None:
    assert rows(section)
    named = [path for path, _ in rows(section)]
    beside = [
        f"{room(path)}/{name}" for path, words in rows(section) for name in FILE_NAME.findall(words)
    ]
    # `verdicts.py` is named in the row of another room, which writes what it has made
    known = {Path(path).name for path in named}
    missing = [path for path in named + beside if not (ROOT / path).is_file()]
    assert [path for path in missing if Path(path).name not in known] == []


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_function_is_in_the_file_of_its_row(section: str) -> None:
    for path, words in rows(section):
        if path.endswith(".py"):
            functions = {
                name
                for name in NAME.findall(words)
                if name not in NOT_OF_THE_FILE and not name.endswith((".py", ".j2"))
            }
            if path == "reports/__main__.py":  # named by its command
                functions -= {"render"}
            assert functions <= defined(ROOT / path), path


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_no_room_is_entered_more_than_twice(section: str) -> None:
    entered = Counter(key for key, _ in groupby(room(path) for path, _ in rows(section)))
    assert {name: count for name, count in entered.items() if count > 2} == {}


def named_in(section: str) -> set[str]:
    """The files of a section: those of its rows, and those that are named beside them."""
    return {path for path, _ in rows(section)} | {
        f"{room(path)}/{name}" for path, words in rows(section) for name in FILE_NAME.findall(words)
    }


@pytest.mark.parametrize(
    ("section", "folder"), [("check", "experiments/checking"), ("claim", "reports/claims")]
)
def test_a_check_and_a_claim_pass_every_file_of_their_room(section: str, folder: str) -> None:
    files = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("[!_]*.py")}
    assert files <= named_in(SECTIONS[section])


def test_a_study_passes_every_file_of_the_rooms_that_it_walks_through() -> None:
    """Except what runs only for other commands, which the page says nothing about."""
    named = named_in(SECTIONS["study"])
    others = {
        "reports/analysis/unjudged.py",  # launches without a reference
        "experiments/run/help_texts.py",  # --help
        "experiments/run/ui.py",  # make ui
    }
    for folder in (
        "experiments/study",
        "experiments/launch",
        "experiments/run",
        "experiments/cluster",
        "reports/analysis",
        "reports/page",
    ):
        files = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("[!_]*.py")}
        assert files - others <= named, folder
