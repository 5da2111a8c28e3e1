"""Reads and writes records: append-only JSON lines, each with one `write` and one `fsync`. Standard
library only.

The folder of an execution holds:

    plan.json        the plan
    records.jsonl    the records, one JSON object per line
    tokens.jsonl     {"digest", "tokens"}: each distinct output once, written before the record that refers to it
    environment-*    torch's report on an interpreter and its machine, named by its digest (provenance.collect_env)
    logs/            the output of failed launches
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.records.reading import (
    RECORDS,
    SCHEMA,
    TOKENS,
    RecordError,
    RecordFile,
    json_object,
    read,
    read_records,
    token_lines,
)
from experiments.records.types import JsonObject, LaunchRecord, Plan, Record, TokenLine, Tokens

__all__ = [
    "DONE",
    "ENVIRONMENTS",
    "INTACT",
    "LOGS",
    "PLAN",
    "RECORDS",
    "SCHEMA",
    "TOKENS",
    "Folder",
    "JsonLines",
    "Record",
    "RecordError",
    "counted",
    "decided",
    "launches",
    "plan_hash",
    "read",
    "read_for_report",
    "read_json",
    "read_plan",
    "superseded",
    "sync_folder",
    "token_lines",
    "write_plan",
    "write_whole",
]

PLAN, LOGS, ENVIRONMENTS = "plan.json", "logs", "environment-*.txt"
Attempt = tuple[str, int]
DONE = ("ok", "invalid")
"""A launch with a record of this status is not repeated."""
INTACT = (
    "Earlier records are intact. Free some disk space, then run the same command again (with --resume for "
    "experiments.launch) to continue."
)


class JsonLines:
    """Appends lines to a file, each completely or not at all."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Removes a truncated last line and reports it in `healed`.
        Raises RecordError if the file cannot be opened.
        """
        self.path = path
        self.healed: str | None = None
        is_new = not path.exists()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if is_new:
                sync_folder(path.parent)
            self._heal()
        except OSError as error:
            raise RecordError(f"{path}: cannot be written ({error}). {INTACT}") from error

    def append(self, record: Record | TokenLine) -> None:
        """Raises RecordError if the line cannot be written; the file is then as it was before."""
        try:
            data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except ValueError as error:
            raise RecordError(
                f"{self.path}: {_not_finite(record)}. Nothing was written; earlier records are intact"
            ) from error
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes were written: the disk is full")
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise RecordError(
                f"{self.path}: cannot write a record of {len(data)} bytes ({error}). {INTACT}"
            ) from error

    def close(self) -> None:
        os.close(self._fd)

    def _heal(self) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        tail = content[end:]
        if not tail:
            return
        if json_object(tail) is not None:  # only its end of line is missing
            os.write(self._fd, b"\n")
            os.fsync(self._fd)
            return
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)
        self.healed = f"{self.path}: removed a truncated last line of {len(tail)} bytes (after a power cut, a kill or a full disk)"


class Folder:
    """The folder of an execution, locked by one runner at a time."""

    def __init__(self, path: Path) -> None:
        """Raises RecordError if another runner has locked the folder, if it cannot be written, or if
        its records cannot be read.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RecordError(f"{path}: cannot be written ({error}). {INTACT}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise RecordError(
                f"{path}: another runner is using this folder; wait for it, or give another folder"
            ) from error
        try:
            # before any repair, so that a file of a newer version is not changed
            self.records = read(path)
            self._records, self._tokens = JsonLines(path / RECORDS), JsonLines(path / TOKENS)
            self.messages = [
                lines.healed for lines in (self._records, self._tokens) if lines.healed
            ]
            self._digests = {line["digest"] for line in token_lines(path)}
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, record: Record, tokens: Tokens | None = None) -> None:
        """Writes tokens that are not stored yet, then the record that refers to them. Raises
        RecordError.
        """
        for digest, encoded in (tokens or {}).items():
            if digest not in self._digests:
                self._tokens.append({"digest": digest, "tokens": encoded})
                self._digests.add(digest)
        self._records.append(record)
        self.records.append(record)

    def close(self) -> None:
        self._records.close()
        self._tokens.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def superseded(records: Iterable[Record]) -> dict[Attempt, str]:
    """{(launch, attempt): reason} of the attempts that no longer count."""
    return {
        (record["launch"], record["attempt"]): record.get("reason") or "no reason recorded"
        for record in records
        if record["kind"] == "superseded"
    }


def launches(records: Iterable[Record]) -> list[LaunchRecord]:
    """The launch records that are not superseded."""
    records = list(records)
    marked = superseded(records)
    return [
        record
        for record in records
        if record["kind"] == "launch" and (record["launch"], record["attempt"]) not in marked
    ]


def decided(attempts: Iterable[LaunchRecord]) -> Iterator[tuple[LaunchRecord, str | None]]:
    """Each attempt and why it does not count, None if it does: of each launch the first finished
    attempt counts, if its status is `ok`. attempts: without superseded ones.
    """
    finished: set[str] = set()
    for record in attempts:
        if record["launch"] in finished:
            yield record, "an earlier attempt of this launch had finished"
            continue
        if record["status"] in DONE:
            finished.add(record["launch"])
        if record["status"] == "ok":
            yield record, None
        else:
            yield record, f"{record['status']}: {record.get('reason') or 'no reason recorded'}"


def counted(records: Iterable[Record]) -> list[LaunchRecord]:
    """The launches that count, as far as records alone tell; reports/analysis/counting.py also
    applies the plan and the gate.
    """
    return [record for record, reason in decided(launches(records)) if reason is None]


def read_plan(path: Path) -> Plan:
    """Raises RecordError for a plan that is missing, damaged, edited or of another version."""
    try:
        plan: Plan = json.loads(path.read_text())
        if not isinstance(plan, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path}: cannot read the plan ({error}); write one with `python -m experiments run --dry-run --write-plan {path}`"
        ) from error
    if plan.get("plan_version") != 1:
        raise RecordError(
            f"{path}: plan_version {plan.get('plan_version')!r}; this program reads version 1"
        )
    if plan.get("plan_hash") != plan_hash(plan):
        raise RecordError(
            f"{path}: plan_hash does not match the content, so the plan was edited; make it again from its study"
        )
    return plan


def read_for_report(folder: Path) -> tuple[Plan, RecordFile]:
    """The plan and the records of a finished, killed or copied execution. What cannot be trusted is
    left out and named in `RecordFile.notes`, which the report prints. Raises RecordError for what is no
    folder of an execution, and if either file cannot be used at all.
    """
    if not (folder / PLAN).is_file():
        missing = f"it holds no {PLAN}" if folder.is_dir() else "there is no such folder"
        raise RecordError(f"{folder}: {missing}; give a folder with {PLAN} and {RECORDS}")
    return read_plan(folder / PLAN), read_records(folder / RECORDS)


def write_plan(plan: Plan, path: Path) -> None:
    """Writes a plan, completely or not at all."""
    write_whole(path, json.dumps(plan, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file completely or not at all, even in a power cut: to a temporary file that is
    synced and renamed. Raises RecordError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error}). {INTACT}") from error


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that new names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file."""
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def plan_hash(plan: Mapping[str, object]) -> str:
    """SHA-256 of the plan without its `plan_hash`."""
    content = {key: value for key, value in plan.items() if key != "plan_hash"}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _not_finite(value: Any, name: str = "record") -> str | None:
    """Names a number in a record that JSON cannot represent; None if all are finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}; allowed: finite numbers, or null for an unknown value"
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return next(filter(None, (_not_finite(item, f"{name}[{key!r}]") for key, item in items)), None)
