"""The pages that people read, and the code in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"(?ms)^```(\w+)\n(.*?)^```$")


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for found, code in FENCE.findall(text) if found == language]


def block(page: str, language: str, holds: str) -> str:
    """The one block of a page that contains `holds`."""
    (found,) = [code for code in blocks(page, language) if holds in code]
    return found
