"""The tests are tested: every bad implementation dies by an assertion of the property that is there for it."""

from __future__ import annotations

import pytest

from property_tests.bad_implementations import BAD, BadImplementation
from property_tests.kill import kill, properties

EXAMPLES = {"engine_machine": 1500, "every_token_is_that_of_hf": 150, "company_does_not_matter": 60}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_implementation_dies(bad: BadImplementation) -> None:
    tested = properties()[bad.killer]
    verdict = kill(bad, tested, EXAMPLES.get(bad.killer, max(tested.fast, 20)))
    assert verdict.killed, f"{bad.name} survives {bad.killer}; {verdict.message}"
    print(f"{bad.name}: killed by {bad.killer}: {verdict.message}")
