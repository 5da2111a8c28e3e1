"""Records are appended whole or not at all, and read without guessing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.records import store
from experiments.records.reading import read_records
from experiments.records.store import Folder, RecordError
from tests.support.fake_engine import ENVIRONMENT, make_plan


def launch(name: str, attempt: int = 1, status: str = "ok") -> dict[str, Any]:
    return {"kind": "launch", "schema": 1, "launch": name, "attempt": attempt, "status": status}


def test_a_cut_last_line_is_removed_and_said(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder:
        folder.append(launch("a"), {"digest-a": "tokens"})
        folder.append(launch("b"))
    path = tmp_path / store.RECORDS
    whole = path.read_bytes()
    for cut in range(2, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        with Folder(tmp_path) as folder:
            assert [r["launch"] for r in folder.records] == ["a"]
            assert "removed a truncated last line" in folder.messages[0]
            folder.append(launch("b"))
        assert path.read_bytes() == whole


def test_a_record_that_lost_only_its_end_of_line_is_kept(tmp_path: Path) -> None:
    path = tmp_path / store.RECORDS
    path.write_text(json.dumps(launch("a")) + "\n" + json.dumps(launch("b")))
    assert [r["launch"] for r in store.read(tmp_path)] == ["a", "b"]
    with Folder(tmp_path) as folder:
        assert folder.messages == []
        folder.append(launch("c"))
    assert [r["launch"] for r in store.read(tmp_path)] == ["a", "b", "c"]
    # what some file systems leave after a power cut
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with Folder(tmp_path) as folder:
        assert "of 512 bytes" in folder.messages[0]
    assert [r["launch"] for r in store.read(tmp_path)] == ["a", "b", "c"]


def test_tokens_are_written_once_and_before_their_record(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder:
        folder.append(launch("a"), {"x": "1"})
        folder.append(launch("b"), {"x": "1", "y": "2"})
    with Folder(tmp_path) as folder:
        folder.append(launch("c"), {"y": "2"})
    assert [
        json.loads(line)["digest"] for line in (tmp_path / store.TOKENS).read_text().splitlines()
    ] == ["x", "y"]


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Folder(tmp_path) as folder:
        folder.append(launch("a"))
        before = (tmp_path / store.RECORDS).read_bytes()
        real = os.write

        def half(fd: int, data: bytes) -> int:
            return real(fd, data[: len(data) // 2])

        monkeypatch.setattr(store.os, "write", half)
        with pytest.raises(
            RecordError, match=r"the disk is full.*Earlier records are intact.*same command again"
        ):
            folder.append(launch("b"))
        assert (tmp_path / store.RECORDS).read_bytes() == before


FULL_DISK = """
import resource, sys
from pathlib import Path
from experiments.launch.runner import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    """The kernel's limit on the size of a file cuts a write in the middle, as a full disk does."""
    plan = make_plan(tmp_path / "model", blocks=3)
    store.write_plan(plan, tmp_path / "plan.json")
    out = tmp_path / "out"
    arguments = ["--plan", str(tmp_path / "plan.json"), "--out", str(out), "--resume"]
    full = [sys.executable, "-c", FULL_DISK, "20000", *arguments]
    done = subprocess.run(full, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(
        r"cannot write a record of \d+ bytes .*Earlier records are intact.*same command again",
        done.stderr,
    )
    before = (out / store.RECORDS).read_bytes()
    assert before.endswith(b"\n")
    kept = store.counted(store.read(out))
    assert 0 < len(kept) < 9
    # not even the plan, or a new line
    nothing_fits = [sys.executable, "-c", FULL_DISK, "64", *arguments]
    for place in (out, tmp_path / "new"):
        nothing_fits[-2] = str(place)
        done = subprocess.run(
            nothing_fits, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        assert "Earlier records are intact" in done.stderr
    assert (out / store.RECORDS).read_bytes() == before
    done = subprocess.run(
        [sys.executable, "-m", "experiments.launch", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counted = store.counted(store.read(out))
    assert counted[: len(kept)] == kept
    assert [r["launch"] for r in counted] == [entry["launch"] for entry in plan["launches"]]


def test_a_folder_has_one_runner(tmp_path: Path) -> None:
    with Folder(tmp_path), pytest.raises(RecordError, match="another runner is using this folder"):
        Folder(tmp_path)
    Folder(tmp_path).close()


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / store.RECORDS
    path.write_text(json.dumps({**launch("a"), "schema": 2}) + "\n")
    with pytest.raises(
        RecordError, match="line 1: schema 2 is not supported, this program reads 1"
    ):
        store.read(tmp_path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="schema 2 is not supported"):
        Folder(tmp_path)
    assert path.read_bytes() == before, "left as it is"
    path.write_text(json.dumps(launch("a")) + "\nnull\n")
    with pytest.raises(RecordError, match=r"line 2: damaged \(not a JSON object"):
        store.read(tmp_path)
    path.write_text("{nonsense\n" + json.dumps(launch("a")) + "\n")
    with pytest.raises(RecordError, match="line 1: damaged"):
        store.read(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text('{"plan_version": 2}')
    with pytest.raises(RecordError, match="plan_version 2; this program reads version 1"):
        store.read_plan(plan)
    with pytest.raises(RecordError, match=r"cannot read the plan.*--write-plan"):
        store.read_plan(tmp_path / "absent.json")
    plan.write_text("[1]")
    with pytest.raises(
        RecordError, match=r"cannot read the plan \(not a JSON object\).*--write-plan"
    ):
        store.read_plan(plan)


def test_a_duplicated_file_counts_once(tmp_path: Path) -> None:
    text = "".join(json.dumps(launch(name)) + "\n" for name in "ab")
    (tmp_path / store.RECORDS).write_text(text + text)
    assert [r["launch"] for r in store.counted(store.read(tmp_path))] == ["a", "b"]


def test_a_verdict_that_comes_back_is_the_last_one(tmp_path: Path) -> None:
    error, passed = (
        {"kind": "gate", "schema": 1, "status": status} for status in ("error", "pass")
    )
    with Folder(tmp_path) as folder:
        for record in (launch("a"), error, passed, error):
            folder.append(record)
    assert [r.get("status") for r in store.read(tmp_path)] == ["ok", "pass", "error"]
    assert read_records(tmp_path / store.RECORDS).records == store.read(tmp_path), (
        "the report reads the same"
    )


def test_a_number_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder:
        folder.append(launch("a"))
        with pytest.raises(
            RecordError, match=r"record\['workloads'\]\['w'\]\[1\] is nan; allowed: finite numbers"
        ):
            folder.append(launch("b") | {"workloads": {"w": [0.5, float("nan")]}})
    assert [r["launch"] for r in store.read(tmp_path)] == ["a"]


def test_two_visits_copied_into_one_file_are_not_mixed_up(tmp_path: Path) -> None:
    visits = [{**launch("a"), "boot_id": boot} for boot in ("one", "two")]
    (tmp_path / store.RECORDS).write_text("".join(json.dumps(record) + "\n" for record in visits))
    with pytest.raises(
        RecordError,
        match=r"line 2: another record of a, attempt 1: .*two folders.*import FOLDER FOLDER --merge",
    ):
        store.read(tmp_path)


def test_what_counts() -> None:
    found = [
        launch("failed-then-ok", 1, "failed"),
        launch("failed-then-ok", 2),
        # the first that finished decides, whatever came of it
        launch("invalid", 1, "invalid"),
        launch("invalid", 2),
        launch("twice", 1),
        launch("twice", 2),
        launch("superseded", 1),
        {"kind": "superseded", "schema": 1, "launch": "superseded", "attempt": 1},
        launch("superseded", 2),
    ]
    counted = [(r["launch"], r["attempt"]) for r in store.counted(found)]
    assert counted == [("failed-then-ok", 2), ("twice", 1), ("superseded", 2)]
