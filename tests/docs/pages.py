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


ABBREVIATIONS = {
    "TTFT": "time to first token",
    "TPOT": "per output token",
    "ITL": "inter-token latency",
    "E2E": "end",
    "SLO": "service level objective",
}


def unexplained(report: str) -> list[str]:
    """The abbreviations that a report uses before it says what they stand for: their first occurrence has
    the full words right before or after it.
    """
    found = []
    for short, full in ABBREVIATIONS.items():
        first = re.search(rf"\b{short}\b", report)
        if first and full not in report[max(0, first.start() - 40) : first.end() + 40]:
            found.append(short)
    return found
