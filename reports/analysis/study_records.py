"""Reading the records of a finished, killed or carried study for its report.

experiments/records/store.py holds the format and the writer; this reader looks at a file that a power cut
may have truncated or that was copied together from several visits to a host. It takes what can be
trusted, and names everything it did not take in `RecordFile.notes`, which the report prints. A file
of an unknown schema is refused as a whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.records.store import PLAN, RECORDS, SCHEMA, Record, RecordError, read_plan

__all__ = ["KINDS", "RecordError", "RecordFile", "read_folder", "read_plan", "read_records"]

KINDS = ("launch", "gate", "superseded", "resumed")

# Every record begins with its kind, so a record glued to the stump of a truncated one can still be
# found.
RECORD_START = b'{"kind"'


@dataclass(frozen=True)
class RecordFile:
    """The records of one file in order, and what was noticed while reading (sentences for the
    report).
    """

    records: list[Record]
    notes: list[str]


def read_folder(folder: Path) -> tuple[Record, RecordFile]:
    """The plan and the records of one execution. Raises RecordError where either cannot be used."""
    return read_plan(folder / PLAN), read_records(folder / RECORDS)


def read_records(path: Path) -> RecordFile:
    """Record v1, one JSON object a line, each line that occurs twice taken once: a verdict of the
    gate where it was given last, as the last one counts, anything else where it came first.

    Raises RecordError on a missing file and on a record of another schema: counting the rest of
    such a file could miss what the unknown record says (that a launch was superseded, say).
    """
    if not path.is_file():
        raise RecordError(f"{path}: no such file; run the study first (make ablate)")
    records: dict[bytes, Record] = {}
    notes: list[str] = []
    seen: set[bytes] = set()
    duplicates = 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if line in seen:
            duplicates += 1
            if line in records and records[line]["kind"] == "gate":
                records[line] = records.pop(line)
            continue
        seen.add(line)
        record, note = _parse(line, is_last=number == len(lines))
        if note:
            notes.append(f"{path.name}, line {number}: {note}")
        if record is None:
            continue
        if record.get("schema") != SCHEMA:
            raise RecordError(
                f"{path}, line {number}: schema {record.get('schema')!r} is unknown, this program reads {SCHEMA}; "
                "render with the version of nanovllm that wrote these records, or a newer one"
            )
        if record.get("kind") not in KINDS:
            notes.append(
                f"{path.name}, line {number}: unknown kind {record.get('kind')!r}, left out (known: {', '.join(KINDS)})"
            )
            continue
        records[line] = record
    if duplicates:
        notes.append(
            f"{path.name}: {duplicates} duplicated line{'s' if duplicates > 1 else ''}, taken once"
        )
    return RecordFile(list(records.values()), notes)


def _parse(line: bytes, is_last: bool) -> tuple[Record | None, str | None]:
    """One line -> (record or None, note or None)."""
    record = _json_object(line)
    if record is not None:
        return record, None
    start = line.rfind(RECORD_START)
    if start > 0:
        record = _json_object(line[start:])
        if record is not None:
            return (
                record,
                "the stump of a truncated record stands before a whole one; the whole one was taken",
            )
    if is_last:
        return None, "truncated last line (its writer was stopped while writing), left out"
    return None, "not a JSON record, left out"


def _json_object(data: bytes) -> Record | None:
    """The JSON object in `data`, or None where it is not one."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
