"""`make mutants`: what it changes, which tests it takes, what it keeps, and its page."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from property_tests.mutants import baseline, page, results
from property_tests.mutants.baseline import TimedFile, chosen_tests
from property_tests.mutants.operators import mutants_of, mutated, with_probes
from property_tests.mutants.rooms import ROOMS, ROOT, Room, all_modules, path_of

SAMPLE = '''"""Text stays."""
LIMIT = 8


def largest(values: list[int], last: bool = False) -> int | None:
    """Text stays."""
    best = None
    for value in values[1:]:
        if best is None or value > best and not last:
            best = value + 1
            values.append(value)
        elif value == "stop":
            break
    if best is not None and best < -LIMIT:
        raise ValueError(f"{best} is less than {-LIMIT + 0}")
    return max(best or 0, sum(v for v in values if v))
'''


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE)
    return path


def test_a_mutant_changes_one_place_and_no_text(sample: Path) -> None:
    found = mutants_of("sample", sample)
    original = ast.unparse(ast.parse(SAMPLE))
    for mutant in found:
        changed = ast.unparse(mutated(SAMPLE, mutant.index))
        assert changed != original, mutant
        assert "Text stays" in changed
        assert "is less than {-LIMIT + 0}" in changed
        assert mutant.before != mutant.after
    changes = {(mutant.before, mutant.after) for mutant in found}
    for before, after in (
        ("LIMIT = 8", "LIMIT = 9"),
        ("for value in values[1:]:", "for value in values[:]:"),
        ("break", "continue"),
        ("values.append(value)", "pass"),
        ("best = value + 1", "best = value - 1"),
    ):
        assert (before, after) in changes or (before, after.rstrip(":")) in changes
    texts = [mutant.after for mutant in found]
    assert any(text.startswith("if best is None or (value >= best and") for text in texts)
    assert any("best is None and" in text for text in texts)
    assert any("best < LIMIT" in text for text in texts)
    assert any('"stop?"' in text or "'stop?'" in text for text in texts)
    assert any(text.startswith("return min(") for text in texts)
    assert any("last: bool=True" in text for text in texts)
    assert len({mutant.name for mutant in found}) == len(found)


def test_a_mutant_keeps_its_name_while_its_function_stays(sample: Path) -> None:
    before = {m.name: m for m in mutants_of("sample", sample)}
    sample.write_text(SAMPLE.replace("LIMIT = 8", "OTHER = [1, 2]\nLIMIT = 8"))
    after = {m.name: m for m in mutants_of("sample", sample)}
    name = "sample:largest:compare:1"
    assert before[name].function_digest == after[name].function_digest
    sample.write_text(SAMPLE.replace("value + 1", "value + 2"))
    assert mutants_of("sample", sample) != []
    changed = {m.name: m for m in mutants_of("sample", sample)}
    assert before[name].function_digest != changed[name].function_digest


def test_probes_tell_what_ran_and_change_nothing(sample: Path) -> None:
    reached: set[tuple[str, int]] = set()
    plain: dict[str, Any] = {}
    probed: dict[str, Any] = {"__reached__": reached.add}
    exec(SAMPLE, plain)
    exec(compile(with_probes(SAMPLE, "sample"), "sample", "exec"), probed)
    at_import = set(reached)
    assert probed["__doc__"] == "Text stays."
    assert probed["largest"].__doc__ == "Text stays."
    assert probed["largest"]([5]) == plain["largest"]([5]) == 5
    without_loop = reached - at_import
    assert probed["largest"]([0, 3]) == plain["largest"]([0, 3])
    numbers = {m.before: m.statement for m in mutants_of("sample", sample)}
    assert ("sample", numbers["best = value + 1"]) in reached - without_loop
    assert ("sample", numbers["break"]) not in reached


def test_every_module_exists_and_has_mutants() -> None:
    for module in all_modules():
        assert path_of(module).is_file(), module
        assert mutants_of(module, path_of(module)), module
    assert len(set(all_modules())) == len(all_modules())
    for room in ROOMS:
        missing = [file for file in room.tests if not (ROOT / file).is_file()]
        assert not missing, f"{room.name}: {missing}"


def test_a_mutant_gets_the_tests_that_reach_it_the_quickest_first(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = next(m for m in mutants_of("sample", sample) if m.before == "best = value + 1")
    here, elsewhere = frozenset({mutant.statement}), frozenset({mutant.statement + 1})
    file = TimedFile(
        "a.py",
        {
            "slow": (9.0, {"sample": here}),
            "quick": (0.1, {"sample": here}),
            "other": (0.1, {"sample": elsewhere}),
            "of another module": (0.1, {}),
        },
    )
    monkeypatch.setattr(baseline, "digest_of", lambda module: f"digest of {module}")
    room = Room("room", ("sample",), ("a.py",))
    assert list(chosen_tests(mutant, room, {"a.py": file}, 60.0)) == ["quick", "slow"]
    assert list(chosen_tests(mutant, room, {"a.py": file}, 5.0)) == ["quick"]
    file.shared = {"sample": {mutant.statement}}
    assert set(chosen_tests(mutant, room, {"a.py": file}, 60.0)) == {"quick", "slow", "other"}
    assert TimedFile.of(json.loads(json.dumps(file.line("key")))) == file


def test_what_was_cut_off_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, {"mutant": "a", "outcome": "failed"})
    with path.open("a") as file:
        file.write('{"mutant": "b", "outco')
    assert [line["mutant"] for line in results.read(path)] == ["a"]
    results.append(path, {"mutant": "c", "outcome": "survived"})
    assert [line["mutant"] for line in results.read(path)] == ["a", "c"]


def line(name: str, outcome: str, **more: str) -> dict[str, Any]:
    return {
        "mutant": name, "outcome": outcome, "digest": "d", "line": 1, "before": "a < b",
        "after": "a <= b", **more,
    }  # fmt: skip


def test_fates_follow_from_results_and_judgements() -> None:
    lines = [
        line("m:f:compare:1", "failed", killer="tests/a.py::test_x"),
        line("m:f:compare:2", "survived"),
        line("m:f:compare:2", "failed", killer="property_tests/a.py::test_x"),
        line("m:f:compare:3", "unreached"),
        line("m:f:compare:3", "timeout", killer="tests/a.py::test_x"),
        line("m:f:compare:4", "survived"),
        line("m:f:compare:5", "survived"),
        line("m:f:compare:6", "error"),
    ]
    judged = {"m:f:compare:4": page.Judgement("equivalent", "why")}
    found = {fate.name[-1]: fate.column for fate in page.fates(lines, judged)}
    assert found == {
        "1": "killed",
        "2": "property",
        "3": "example",
        "4": "equivalent",
        "5": "open",
    }
    assert page.share_open(page.fates(lines, judged)) == 0.2


def test_a_judgement_needs_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "judgements.toml"
    path.write_text('[[survivor]]\nmutant = "a"\nverdict = "equivalent"\nwhy = " "\n')
    with pytest.raises(ValueError, match="with a reason"):
        page.judgements(path)
    path.write_text('[[survivor]]\nmutant = "a"\nverdict = "fine"\nwhy = "it is"\n')
    with pytest.raises(ValueError, match="equivalent and open"):
        page.judgements(path)


def test_the_page_is_what_the_committed_results_say() -> None:
    lines, judged = results.read(results.RESULTS), page.judgements()
    assert page.DOCUMENT.read_text() == page.document(lines, judged)
    known = page.fates(lines, judged)
    assert page.share_open(known) <= page.MOST_OPEN
    assert not set(judged) - {fate.name for fate in known}, "judged and never tried"


TESTS = """
from planted.module import half

def test_half():
    assert half(5) == 2

def test_that_fails_anyhow():
    assert half(4) == 3

def test_of_something_else():
    pass
"""


def test_a_run_kills_what_the_tests_notice(tmp_path: Path) -> None:
    """In a folder of its own that has the shape of the project: nothing else is known of it."""
    for name in ("property_tests/mutants", "property_tests/support", "planted"):
        (tmp_path / name).mkdir(parents=True)
    for source in (ROOT / "property_tests" / "mutants").glob("*.py"):
        (tmp_path / "property_tests" / "mutants" / source.name).write_text(source.read_text())
    for name in ("__init__", "profiles"):
        text = (ROOT / "property_tests" / "support" / f"{name}.py").read_text()
        (tmp_path / "property_tests" / "support" / f"{name}.py").write_text(text)
    (tmp_path / "property_tests" / "__init__.py").write_text("")
    (tmp_path / "property_tests" / "mutants" / "preload.py").write_text("import pytest\n")
    (tmp_path / "property_tests" / "mutants" / "rooms.py").write_text(
        (ROOT / "property_tests" / "mutants" / "rooms.py").read_text()
        + '\nROOMS = (Room("planted", ("planted.module",), ("test_planted.py",)),)\n'
    )
    (tmp_path / "planted" / "__init__.py").write_text("")
    (tmp_path / "planted" / "module.py").write_text(
        "def half(n):\n    return n // 2\n\n\ndef unused(n):\n    return n + 1\n"
    )
    (tmp_path / "test_planted.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\nmarkers = ['slow', 'bench']\n"
    )
    command = [sys.executable, "-m", "property_tests.mutants", "run", "--jobs", "2"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = results.read(tmp_path / "property_tests" / "mutants" / "results.jsonl")
    outcomes = {found["mutant"]: found for found in lines if "mutant" in found}
    assert {name: found["outcome"] for name, found in outcomes.items()} == {
        "planted.module:half:arithmetic:1": "failed",
        "planted.module:half:constant:1": "failed",
        "planted.module:unused:arithmetic:1": "unreached",
        "planted.module:unused:constant:1": "unreached",
        "planted.module:unused:constant:2": "unreached",
    }
    killer = outcomes["planted.module:half:arithmetic:1"]["killer"]
    assert killer == "test_planted.py::test_half"
    assert "test_that_fails_anyhow" in done.stdout, "it is said that it was left out"
    assert (
        (tmp_path / "planted" / "module.py")
        .read_text()
        .startswith("def half(n):\n    return n // 2\n")
    )
    again = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert "0 of them to try" in again.stdout, "an interrupted run goes on where it ended"
