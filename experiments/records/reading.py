"""Reads record files, strictly for a run and leniently for a report. Standard library only.

Both readers share one parser. `read` raises RecordError for any damage, because a run appends to the
file and repeats what it does not find. `read_records` takes what can be trusted, and names everything
else in notes that a report prints: the file may have been truncated in a power cut, or copied
together from several folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.records.types import Record, TokenLine

SCHEMA = 1
RECORDS, TOKENS = "records.jsonl", "tokens.jsonl"
KINDS = ("launch", "gate", "price", "superseded", "resumed")
_START = b'{"kind"'
"""Every record starts with its kind, so that a record can be found after a truncated one."""
_TRUNCATED = "truncated last line (its writer was stopped while writing), left out"


class RecordError(Exception):
    """A folder of records that cannot be read or written; the message says what to do."""


@dataclass(frozen=True)
class RecordFile:
    """The records of a file in order, and notes about what was left out."""

    records: list[Record]
    notes: list[str]


@dataclass(frozen=True)
class _Line:
    number: int
    text: bytes
    value: dict[str, Any] | None
    problem: str | None


def read(folder: Path) -> list[Record]:
    """All records of a folder, each once; empty if it has none. Raises RecordError for a damaged
    line, an unknown schema or kind, and for two different records of one attempt (two folders
    copied together). A truncated last line is ignored.
    """
    path = folder / RECORDS
    if not path.exists():
        return []
    lines, _ = _unique(path)
    attempts: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        where, record = f"{path}, line {line.number}", line.value
        if line.problem == _TRUNCATED:
            continue
        if line.problem or record is None:
            raise RecordError(
                f"{where}: damaged ({line.problem}); restore the file, or remove this line"
            )
        if record.get("kind") == "launch":
            key = (record["launch"], record["attempt"])
            if attempts.setdefault(key, record) != record:
                raise RecordError(
                    f"{where}: another record of {key[0]}, attempt {key[1]}: this file was copied together from "
                    "two folders. Keep the folders apart, and count them as one with "
                    "`python -m experiments import FOLDER FOLDER --merge NEW_FOLDER`."
                )
    return _records(lines)


def read_records(path: Path) -> RecordFile:
    """The records of a file, each once, and notes about damaged lines and unknown kinds, which are
    left out. Raises RecordError for a missing file, and for an unknown schema: such a record could
    say, for instance, that a launch was superseded.
    """
    if not path.is_file():
        raise RecordError(f"{path}: no such file; run the study first (make ablate)")
    lines, duplicates = _unique(path)
    notes = [
        f"{path.name}, line {line.number}: {line.problem}"
        for line in sorted(lines, key=lambda line: line.number)
        if line.problem
    ]
    if duplicates:
        notes.append(
            f"{path.name}: {duplicates} duplicated line{'s' if duplicates > 1 else ''}, taken once"
        )
    return RecordFile(_records(lines), notes)


def token_lines(folder: Path) -> list[TokenLine]:
    """The lines of tokens.jsonl, without a truncated last one. Raises RecordError for damage."""
    path = folder / TOKENS
    found: list[TokenLine] = []
    for line in _parsed(path) if path.exists() else ():
        if line.problem is None and line.value is not None:
            found.append({"digest": line.value["digest"], "tokens": line.value["tokens"]})
        elif line.problem != _TRUNCATED:
            raise RecordError(
                f"{path}, line {line.number}: damaged ({line.problem}); restore the file, or remove this line"
            )
    return found


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in `data`, or None if it is not one."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _records(lines: list[_Line]) -> list[Record]:
    return [
        line.value  # type: ignore[misc]  # checked by _unique as far as its schema and kind
        for line in lines
        if line.value is not None
    ]


def _unique(path: Path) -> tuple[list[_Line], int]:
    """(the lines of a file of records, each once; the number of duplicates). Of a repeated verdict of
    the gate or price the last one is kept, because the last one counts; of other records, the first.
    Raises RecordError for an unknown schema.
    """
    lines: dict[bytes, _Line] = {}
    duplicates = 0
    for line in _parsed(path):
        if line.text in lines:
            duplicates += 1
            earlier = lines[line.text]
            if earlier.value is not None and earlier.value["kind"] in ("gate", "price"):
                lines[line.text] = lines.pop(line.text)
            continue
        record, problem = line.value, line.problem
        if record is not None and record.get("schema") != SCHEMA:
            raise RecordError(
                f"{path}, line {line.number}: schema {record.get('schema')!r} is not supported, this program reads {SCHEMA}; "
                "read it with the version of nanovllm that wrote it, or a newer one"
            )
        if record is not None and record.get("kind") not in KINDS:
            problem = f"unknown kind {record.get('kind')!r}, left out (known: {', '.join(KINDS)})"
            record = None
        lines[line.text] = _Line(line.number, line.text, record, problem)
    return list(lines.values()), duplicates


def _parsed(path: Path) -> Iterator[_Line]:
    """The lines of a file that are not empty. A line has a value, a problem, or both: a record after
    a truncated one can be read.
    """
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        value, problem = json_object(text), None
        if value is None:
            start = text.rfind(_START)
            value = json_object(text[start:]) if start > 0 else None
            if value is not None:
                problem = "begins with a truncated record, of which only the complete one after it was taken"
            elif number == len(lines):
                problem = _TRUNCATED
            else:
                problem = "not a JSON object, left out"
        yield _Line(number, text, value, problem)
