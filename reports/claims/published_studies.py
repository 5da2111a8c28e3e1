"""The published records: every folder under reports/published that holds a plan and its records,
and single results beside them.

What is said in docs/claims.md and docs/questions.md is read from here and from nowhere else, so
that a folder which is added here changes those pages by itself, and a figure without records cannot
get into them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.records.store import PLAN, RECORDS, read_for_report
from experiments.records.types import Plan, Record
from reports.analysis.analyse import analyse
from reports.analysis.types import Analysis

PUBLISHED = Path(__file__).resolve().parents[1] / "published"


@dataclass(frozen=True)
class Study:
    """One published execution. name: its folder, relative to the root of all, with slashes."""

    name: str
    folder: Path
    plan: Plan
    records: list[Record]
    analysis: Analysis

    @property
    def hardware(self) -> str:
        """The GPU or the CPU of the counted launches, as they reported it."""
        counted = [record["provenance"] for record in self.records if record["kind"] == "launch"]
        gpus = [gpu["name"] for gpu in (counted[0].get("gpus") or [])] if counted else []
        cpu = (
            counted[0]["cpu"] if counted else {"model": self.plan["profile"]["name"], "cores": "?"}
        )
        return f"{len(gpus)} x {gpus[0]}" if gpus else f"{cpu['model']}, {cpu['cores']} cores"


@dataclass(frozen=True)
class Library:
    """studies: by name, each read and analysed when it is first asked for; results: every other JSON
    object in a file of its own, by its path (figures of pytest-benchmark, counts of code lines).
    """

    studies: Mapping[str, Study]
    results: Mapping[str, dict[str, Any]]


def folders(root: Path = PUBLISHED) -> list[Path]:
    """The folders of published executions, in the order of their names."""
    return sorted(path.parent for path in root.rglob(PLAN) if (path.parent / RECORDS).is_file())


@lru_cache(maxsize=2)
def library(root: Path = PUBLISHED) -> Library:
    """All of it. Raises ValueError for broken JSON; asking for a study whose folder cannot be read
    raises RecordError.
    """
    return Library(_Studies(root), dict(_results(root)))


class _Studies(Mapping[str, Study]):
    """The folders under `root`, in the order of their names."""

    def __init__(self, root: Path) -> None:
        self._folders = {folder.relative_to(root).as_posix(): folder for folder in folders(root)}
        self._read: dict[str, Study] = {}

    def __getitem__(self, name: str) -> Study:
        if name not in self._read:
            plan, file = read_for_report(folder := self._folders[name])
            analysis = analyse(file.records, plan, file.notes)
            self._read[name] = Study(name, folder, plan, file.records, analysis)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)


def _results(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    studies = folders(root)
    for path in sorted(root.rglob("*.json")):
        if not any(path.is_relative_to(folder) for folder in studies):
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                yield path.relative_to(root).as_posix(), content
