"""Links and paths on the pages lead to something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, FENCE, ROOT, pages

LINK = re.compile(r"\]\(([^)\s]+)\)")
OURS = (
    "src",
    "experiments",
    "reports",
    "ablations",
    "benchmarks",
    "tests",
    "property_tests",
    "docs",
)
MENTIONED = re.compile(rf"`((?:{'|'.join(OURS)})/[\w./-]+)(?:::\w+)?`")
"""A path in a code span, relative to the repository's root; of a test, with its name."""
MADE_BY_THE_READER = re.compile(r"(?:New file|Save this as) `([^`]+)`")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=names)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [link.partition("#")[0] for link in LINK.findall(prose) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).is_file()]
    assert not missing


@pytest.mark.parametrize(
    "page", [page for page in pages() if page.parent != DOCS / "adr"], ids=names
)
def test_every_path_that_is_named_exists(page: Path) -> None:
    """Decisions are left as they were written: what they name may have moved since."""
    text = page.read_text(encoding="utf-8")
    named = {*MENTIONED.findall(text)} - {*MADE_BY_THE_READER.findall(text)}
    assert not sorted(path for path in named if not (ROOT / path).exists())
