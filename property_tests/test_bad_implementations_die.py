"""The tests are tested: every bad implementation dies by an assertion of the property that is there
for it.
"""

from __future__ import annotations

import re

import pytest

from property_tests.bad_implementations import BAD, BadImplementation
from property_tests.kill import examples_for, kill, properties
from property_tests.kill_matrix import DOCUMENT, FACTS, KINDS


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_implementation_dies(bad: BadImplementation) -> None:
    tested = properties()[bad.killer]
    verdict = kill(bad, tested, examples_for(bad, tested))
    print(f"{bad.name}: killed by {bad.killer}: {verdict.message}")
    assert verdict.killed, f"{bad.name} survives {bad.killer}; {verdict.message}"


def test_bad_implementations_cover_the_known_bugs() -> None:
    assert {bad.fact for bad in BAD} - {""} == set(FACTS)
    assert {bad.kind for bad in BAD} == set(KINDS)
    assert len({bad.name for bad in BAD}) == len(BAD) >= 25
    assert all(bad.what for bad in BAD)


def test_the_page_names_what_there_is() -> None:
    """docs/bad-implementations.md has every name of today, and shows each of them dead. `make
    property MATRIX=1` renews it.
    """
    page = DOCUMENT.read_text()
    names = list(properties())
    assert re.findall(r"^\| \d+ \| `(\w+)` \|", page, re.M) == names
    of_a_kind = dict(re.findall(r"^\| ([a-z][a-z -]+) \| \S.* \| (`.*`) \|$", page, re.M))
    assert list(of_a_kind) == list(KINDS)
    for kind, listed in of_a_kind.items():
        assert re.findall(r"`(\w+)`", listed) == [bad.name for bad in BAD if bad.kind == kind]
    rows = dict(re.findall(r"^\| `(\w+)` (.*) \|$", page, re.M))
    assert list(rows) == [bad.name for bad in BAD]
    for bad in BAD:
        cells = rows[bad.name].split(" | ")[2:]
        assert cells[names.index(bad.killer)].strip() == "**x**", (
            f"the page does not show {bad.name} killed by {bad.killer}"
        )
