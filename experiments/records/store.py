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
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCHEMA = 1
RECORDS, TOKENS, PLAN, LOGS, ENVIRONMENTS = (
    "records.jsonl",
    "tokens.jsonl",
    "plan.json",
    "logs",
    "environment-*.txt",
)
DONE = ("ok", "invalid")
"""A launch with a record of this status is not repeated."""
INTACT = (
    "Earlier records are intact. Free some disk space, then run the same command again (with --resume for "
    "experiments.launch) to continue."
)

Record = dict[str, Any]


class RecordError(Exception):
    """A folder of records that cannot be read or written; the message says what to do."""


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

    def append(self, record: Record) -> None:
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
        if _is_whole(tail):  # only its end of line is missing
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

    def append(self, record: Record, tokens: dict[str, str] | None = None) -> None:
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


def read(folder: Path) -> list[Record]:
    """All records of a folder in the order of writing, duplicated lines once: a verdict of the gate
    where it was given last, as the last one counts, anything else where it came first. Raises
    RecordError for a damaged line, for a schema newer than this program, and for two different
    records of one attempt (two folders copied together).
    """
    records: dict[str, Record] = {}
    attempts: dict[tuple[str, int], str] = {}
    for number, record in enumerate(_lines(folder / RECORDS), start=1):
        where = f"{folder / RECORDS}, line {number}"
        schema = record.get("schema", SCHEMA)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise RecordError(
                f"{where}: schema {schema} is newer than this program's {SCHEMA}; "
                "read it with the version of nanovllm that wrote it, or a newer one"
            )
        text = json.dumps(record, sort_keys=True)
        if (
            record.get("kind") == "launch"
            and attempts.setdefault((record["launch"], record["attempt"]), text) != text
        ):
            raise RecordError(
                f"{where}: another record of {record['launch']}, attempt {record['attempt']}: this file was copied together from "
                "two visits. Keep their folders apart, and count them as one with "
                "`python -m experiments import FOLDER FOLDER --merge NEW_FOLDER`."
            )
        if record.get("kind") == "gate":
            records.pop(text, None)
        records.setdefault(text, record)
    return list(records.values())


def token_lines(folder: Path) -> list[Record]:
    """The lines of tokens.jsonl. Raises RecordError."""
    return _lines(folder / TOKENS)


def launches(records: Iterable[Record]) -> list[Record]:
    """The launch records that no later `superseded` record has marked."""
    superseded = {(r["launch"], r["attempt"]) for r in records if r["kind"] == "superseded"}
    return [
        r
        for r in records
        if r["kind"] == "launch" and (r["launch"], r["attempt"]) not in superseded
    ]


def counted(records: Iterable[Record]) -> list[Record]:
    """The launches that count: of each launch the first finished attempt that was not superseded,
    if its status is `ok`.
    """
    finished: dict[str, Record] = {}
    for record in launches(records):
        if record["status"] in DONE:
            finished.setdefault(record["launch"], record)
    return [record for record in finished.values() if record["status"] == "ok"]


def read_plan(path: Path) -> dict[str, Any]:
    """Raises RecordError for a plan that is missing, damaged, edited or of another version."""
    try:
        plan = json.loads(path.read_text())
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


def write_plan(plan: dict[str, Any], path: Path) -> None:
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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def plan_hash(plan: dict[str, Any]) -> str:
    """SHA-256 of the plan without its `plan_hash`."""
    content = {key: value for key, value in plan.items() if key != "plan_hash"}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _lines(path: Path) -> list[Record]:
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    whole = content if _is_whole(content[end:]) else content[:end]
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise RecordError(
                f"{path}, line {number}: damaged ({error}); restore the file, or remove this line"
            ) from error
        lines.append(record)
    return lines


def _is_whole(line: bytes) -> bool:
    """Whether a last line without a newline is a complete record."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


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
