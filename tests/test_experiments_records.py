"""Records are appended whole or not at all, and read without guessing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from experiments import records
from experiments.records import Folder, RecordError


def launch(name: str, attempt: int = 1, status: str = "ok") -> dict[str, Any]:
    return {"kind": "launch", "schema": 1, "launch": name, "attempt": attempt, "status": status}


def test_a_cut_last_line_is_removed_and_said(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder:
        folder.append(launch("a"), {"digest-a": "tokens"})
        folder.append(launch("b"))
    path = tmp_path / records.RECORDS
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        with Folder(tmp_path) as folder:
            assert [r["launch"] for r in folder.records] == ["a"]
            assert "the last line was cut short" in folder.messages[0]
            folder.append(launch("b"))
        assert path.read_bytes() == whole


def test_tokens_are_written_once_and_before_their_record(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder:
        folder.append(launch("a"), {"x": "1"})
        folder.append(launch("b"), {"x": "1", "y": "2"})
    with Folder(tmp_path) as folder:
        folder.append(launch("c"), {"y": "2"})
    assert [json.loads(line)["digest"] for line in (tmp_path / records.TOKENS).read_text().splitlines()] == ["x", "y"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Folder(tmp_path) as folder:
        folder.append(launch("a"))
        before = (tmp_path / records.RECORDS).read_bytes()
        real = os.write

        def half(fd: int, data: bytes) -> int:
            return real(fd, data[: len(data) // 2])

        monkeypatch.setattr(records.os, "write", half)
        with pytest.raises(RecordError, match=r"the disk is full.*recorded before is intact.*same command again"):
            folder.append(launch("b"))
        assert (tmp_path / records.RECORDS).read_bytes() == before


def test_a_folder_has_one_runner(tmp_path: Path) -> None:
    with Folder(tmp_path), pytest.raises(RecordError, match="another runner is at work here"):
        Folder(tmp_path)
    Folder(tmp_path).close()


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / records.RECORDS
    path.write_text(json.dumps({**launch("a"), "schema": 2}) + "\n")
    with pytest.raises(RecordError, match="line 1: schema 2 is newer than this program's 1"):
        records.read(tmp_path)
    path.write_text("{nonsense\n" + json.dumps(launch("a")) + "\n")
    with pytest.raises(RecordError, match="line 1: damaged"):
        records.read(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text('{"plan_version": 2}')
    with pytest.raises(RecordError, match="plan_version 2; this program reads version 1"):
        records.read_plan(plan)
    with pytest.raises(RecordError, match=r"not a readable plan.*--write-plan"):
        records.read_plan(tmp_path / "absent.json")


def test_a_duplicated_file_counts_once(tmp_path: Path) -> None:
    text = "".join(json.dumps(launch(name)) + "\n" for name in "ab")
    (tmp_path / records.RECORDS).write_text(text + text)
    assert [r["launch"] for r in records.counted(records.read(tmp_path))] == ["a", "b"]


def test_what_counts() -> None:
    found = [
        launch("failed-then-ok", 1, "failed"), launch("failed-then-ok", 2),
        launch("invalid", 1, "invalid"), launch("invalid", 2),  # the first that finished decides, whatever came of it
        launch("twice", 1), launch("twice", 2),
        launch("superseded", 1), {"kind": "superseded", "schema": 1, "launch": "superseded", "attempt": 1},
        launch("superseded", 2),
    ]  # fmt: skip
    counted = [(r["launch"], r["attempt"]) for r in records.counted(found)]
    assert counted == [("failed-then-ok", 2), ("twice", 1), ("superseded", 2)]
