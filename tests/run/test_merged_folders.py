"""Folders of several visits to hosts become one study: every block from one place, nothing lost,
nothing counted twice.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.host import provenance
from experiments.launch.runner import Runner
from experiments.records import merged_folders, store
from experiments.records.store import Folder, RecordError
from tests.support.fake_engine import make_plan


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Visit `one` to host A: block 0 and one launch of block 1. `two`, host B, an empty folder:
    all. `three`: the folder of visit one carried to host C and resumed for block 1.
    """
    path = tmp_path_factory.mktemp("visits")
    plan = make_plan(path / "model", blocks=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "boot_id", lambda: "host-a")
        with Runner(plan, path / "one", resume=False) as runner:
            for entry in runner.pending()[:4]:
                runner.run_launch(entry)
        patch.setattr(provenance, "boot_id", lambda: "host-b")
        with Runner(plan, path / "two", resume=True) as runner:
            runner.run()
        shutil.copytree(path / "one", path / "three")
        patch.setattr(provenance, "boot_id", lambda: "host-c")
        with Runner(plan, path / "three", resume=True) as runner:
            runner.run()
    return path


def counted(folder: Path) -> dict[str, str]:
    """Where each counted launch ran."""
    return {r["launch"]: r["boot_id"] for r in store.counted(store.read(folder))}


def by_block(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for launch, boot in counted(folder).items():
        found.setdefault(launch[:3], set()).add(boot)
    return found


def test_each_block_counts_from_one_place(visited: Path, tmp_path: Path) -> None:
    notes = merged_folders.merge([visited / "one", visited / "two"], tmp_path / "merged")
    assert len(counted(tmp_path / "merged")) == 6
    assert by_block(tmp_path / "merged") == {"b00": {"host-a"}, "b01": {"host-b"}}, (
        "whole blocks first, then the earliest"
    )
    assert any(
        "block 1 was started in 2 places; it is counted from" in note and "host-b" in note
        for note in notes
    )
    found = store.read(tmp_path / "merged")
    assert sum(r["kind"] == "launch" for r in found) == 4 + 6, "nothing is lost"
    assert {r["launch"] for r in found if r["kind"] == "superseded"} == {
        f"b00-{x}" for x in ("o00-baseline", "o01-aa", "o02-prefix_cache=on")
    } | {"b01-o00-baseline"}
    assert len(store.token_lines(tmp_path / "merged")) == len(store.token_lines(visited / "two"))


def test_order_and_repetition_change_nothing(visited: Path, tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    results = []
    for index, order in enumerate(itertools.permutations(names)):
        merged_folders.merge([visited / name for name in (*order, order[0])], tmp_path / str(index))
        results.append((tmp_path / str(index) / store.RECORDS).read_bytes())
    assert len(set(results)) == 1
    assert by_block(tmp_path / "0") == {"b00": {"host-a"}, "b01": {"host-b"}}
    merged_folders.merge([tmp_path / "0", visited / "one", visited / "three"], tmp_path / "again")
    assert counted(tmp_path / "again") == counted(tmp_path / "0"), (
        "a merged folder can be merged again"
    )
    assert sum(r["kind"] == "launch" for r in store.read(tmp_path / "again")) == 4 + 6 + 3


def test_the_environment_reports_that_records_name_are_carried_along(
    visited: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(visited / name, tmp_path / name)
        (tmp_path / name / f"environment-{name}.txt").write_text(name)
    merged_folders.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    assert {
        path.name: path.read_text() for path in (tmp_path / "merged").glob("environment-*")
    } == {"environment-one.txt": "one", "environment-two.txt": "two"}


def test_a_carried_folder_has_its_history_once(visited: Path, tmp_path: Path) -> None:
    merged_folders.merge([visited / "one", visited / "three"], tmp_path / "merged")
    assert counted(tmp_path / "merged") == counted(visited / "three")
    assert sum(r["kind"] == "superseded" for r in store.read(tmp_path / "merged")) == 1


def test_a_merged_folder_can_be_resumed(visited: Path, tmp_path: Path) -> None:
    plan = store.read_plan(visited / "one" / store.PLAN)
    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "boot_id", lambda: "host-d")
        with Runner(plan, part, resume=False) as runner:
            for entry in runner.pending([1])[:2]:
                runner.run_launch(entry)
    merged_folders.merge([visited / "one", part], tmp_path / "merged")
    assert by_block(tmp_path / "merged") == {"b00": {"host-a"}, "b01": {"host-d"}}, (
        "nowhere whole: where more is done"
    )
    with Runner(plan, tmp_path / "merged", resume=True) as runner:
        runner.run()
    assert by_block(tmp_path / "merged") == {"b00": {"host-a"}, "b01": {provenance.boot_id()}}


def test_what_does_not_belong_together_is_refused(visited: Path, tmp_path: Path) -> None:
    with Runner(make_plan(tmp_path / "model", blocks=3), tmp_path / "other-plan", resume=False):
        pass
    with pytest.raises(RecordError, match="only folders of one plan can be merged"):
        merged_folders.merge([visited / "one", tmp_path / "other-plan"], tmp_path / "merged")
    shutil.copytree(visited / "two", tmp_path / "other-code")
    altered = (
        (tmp_path / "other-code" / store.RECORDS)
        .read_text()
        .replace(provenance.code_digest(), "f" * 64)
    )
    (tmp_path / "other-code" / store.RECORDS).write_text(altered)
    with pytest.raises(RecordError, match="different versions of the code"):
        merged_folders.merge([visited / "one", tmp_path / "other-code"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merged_folders.merge([visited / "one", visited / "two"], tmp_path / "merged")
    with pytest.raises(RecordError, match="already holds records"):
        merged_folders.merge([visited / "one", visited / "two"], tmp_path / "merged")
    with pytest.raises(RecordError, match="is one of the folders"):
        merged_folders.merge([visited / "one", visited / "two"], visited / "two")


def test_gate_records_and_hardware_of_all_visits(visited: Path, tmp_path: Path) -> None:
    plan = store.read_plan(visited / "one" / store.PLAN)
    found: list[list[dict[str, Any]]] = [
        copy.deepcopy(store.read(visited / name)) for name in ("one", "two")
    ]
    gate = {
        "kind": "gate",
        "schema": 1,
        "plan_hash": plan["plan_hash"],
        "workload": "a",
        "tokens_digest": "x",
    }
    found[0].append({**gate, "status": "pass"})
    found[1] += [{**gate, "status": "error"}, {**gate, "status": "fail"}]
    for record in found[1]:
        if record["kind"] == "launch":
            record["provenance"]["gpus"] = [{"name": "another GPU"}]
    merged, notes = merged_folders.combine(plan, found)
    assert [r["status"] for r in merged if r["kind"] == "gate"] == ["error", "pass", "fail"], (
        "the last one counts: an error decides nothing, and what failed once is not passed"
    )
    assert "different hardware" in notes[-1]
    assert "another GPU" in notes[-1]
    with Folder(tmp_path) as folder:
        for record in merged:
            folder.append(json.loads(json.dumps(record)))
