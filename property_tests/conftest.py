"""Hypothesis profiles, and what every property test needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from property_tests.support import profiles

profiles.register()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
