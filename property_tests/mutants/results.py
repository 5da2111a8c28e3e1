"""The file of results: JSON lines, written as they come, so that an interruption loses none. Of
several lines about one mutant the last one counts; a line about a function that was changed since
counts no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from property_tests.mutants.operators import Mutant, mutants_of
from property_tests.mutants.rooms import ROOT, all_modules, path_of

RESULTS = Path(__file__).with_name("results.jsonl")
BASELINE = ROOT / ".cache" / "mutants" / "baseline.jsonl"
KILLED = ("failed", "broken", "timeout", "crash")
"""A test failed; nothing could be imported or collected; the time was up; the process died."""
SURVIVED = ("survived", "unreached")
"""unreached: no test runs the statement."""

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The whole lines of the file; a last one that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def append(path: Path, line: Line) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:  # what an interrupted run left of a line
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                content = path.read_bytes()
                file.truncate(content.rfind(b"\n") + 1)
    with path.open("a") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def latest(lines: Iterable[Line], mutants: dict[str, Mutant]) -> dict[str, Line]:
    """By name of the mutant; only of functions that are as they were."""
    found = {}
    for line in lines:
        name = line.get("mutant")
        if name in mutants and line["digest"] == mutants[name].function_digest:
            found[name] = line
    return found


def every_mutant(modules: Iterable[str] = ()) -> dict[str, Mutant]:
    """By name."""
    chosen = list(modules) or all_modules()
    return {m.name: m for module in chosen for m in mutants_of(module, path_of(module))}


def baseline_key(test_file: str) -> str:
    """A digest of the tests of a file, of what they share, and of Python."""
    digest = hashlib.sha256(f"{sys.version} {test_file}".encode())
    shared = sorted((ROOT / "property_tests" / "support").glob("*.py"))
    for path in [ROOT / test_file, *shared]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def digest_of(module: str) -> str:
    """Of its source file."""
    return hashlib.sha256(path_of(module).read_bytes()).hexdigest()[:16]
