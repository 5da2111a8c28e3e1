"""Records: JSON lines that are only ever appended to, one `write` and one `fsync` each. Standard
library only.

A folder of one execution of a plan:

    plan.json        the plan that is being executed
    records.jsonl    record v1, one object a line; the truth
    tokens.jsonl     {"digest", "tokens"}: what was generated, once per digest, before the record that names it
    environment-*    torch's report on an interpreter and its machine, by its digest (provenance.collect_env)
    logs/            the output of launches that failed
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
"""A launch with a record of this status is not run again: whether it is must not depend on how fast it was."""
INTACT = (
    "What was recorded before is intact. Make room on the disk, then run the same command again (--resume for "
    "experiments.launch): it goes on from here."
)

Record = dict[str, Any]


class RecordError(Exception):
    """A folder of records that cannot be read or written; the message says what to do."""


class JsonLines:
    """Appends whole lines to one file; a line is there completely or not at all."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. A last line cut by a power cut or a full disk is removed;
        `healed` then says so.

        Raises RecordError where it cannot be opened.
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
                f"{self.path}: {_not_finite(record)}; nothing was written, what was before is intact"
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
        self.healed = f"{self.path}: the last line was cut short (a power cut, a kill or a full disk); {len(tail)} bytes removed"


class Folder:
    """The folder of one execution, held by one runner at a time."""

    def __init__(self, path: Path) -> None:
        """Raises RecordError where another runner holds the folder, or it cannot be written, or its
        records cannot be read.
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
                f"{path}: another runner is at work here; wait for it or give another folder"
            ) from error
        try:
            # before anything is repaired: a file of a newer program is left as it is
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
        """Writes the tokens that are not there yet, then the record that names them. Raises
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
    """{"digest", "tokens"} of everything that was generated, in the order of writing. Raises
    RecordError.
    """
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
    """What analysis may use: the first finished, not superseded attempt of each launch, if its
    status is `ok`.
    """
    finished: dict[str, Record] = {}
    for record in launches(records):
        if record["status"] in DONE:
            finished.setdefault(record["launch"], record)
    return [record for record in finished.values() if record["status"] == "ok"]


def read_plan(path: Path) -> dict[str, Any]:
    """Raises RecordError for a plan that is absent, damaged, changed by hand or of a newer version."""
    try:
        plan = json.loads(path.read_text())
        if not isinstance(plan, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path}: not a readable plan ({error}); make one with `run --dry-run --write-plan {path}`"
        ) from error
    if plan.get("plan_version") != 1:
        raise RecordError(
            f"{path}: plan_version {plan.get('plan_version')!r}; this program reads version 1"
        )
    if plan.get("plan_hash") != plan_hash(plan):
        raise RecordError(
            f"{path}: plan_hash does not match the content: the plan was edited; make it again from its study"
        )
    return plan


def write_plan(plan: dict[str, Any], path: Path) -> None:
    """Written aside and renamed: a plan is there whole or not at all."""
    write_whole(path, json.dumps(plan, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Written aside, synced and renamed: the file is there whole or not at all, after a power cut
    too. Raises RecordError.
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
    """A new name in a folder outlives a power cut only once the folder itself was synced."""
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
                f"{path}, line {number}: damaged ({error}); restore the file, or remove that one line"
            ) from error
        lines.append(record)
    return lines


def _is_whole(line: bytes) -> bool:
    """Whether a line without its end is a record all the same: the cut, or a copy by hand, took the
    newline only.
    """
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _not_finite(value: Any, name: str = "record") -> str | None:
    """Which number in a record JSON cannot hold, and what may be there; None if all are finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}; allowed: finite numbers, null for what is not known"
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return next(filter(None, (_not_finite(item, f"{name}[{key!r}]") for key, item in items)), None)
