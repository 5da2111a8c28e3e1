"""Fixtures that every test may use."""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is first imported, by whichever test comes first
    os.environ["TRITON_INTERPRET"] = "1"


# A shell that puts a command in the background may have it ignore Ctrl-C, and all its children with
# it; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests measure nothing: they neither wait for a study on this machine nor hold one up.
_LOCKS = tempfile.TemporaryDirectory(prefix="nanovllm-test-locks-")
atexit.register(_LOCKS.cleanup)
os.environ["NANOVLLM_LOCKS"] = _LOCKS.name


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded checkpoint, built once."""
    from nanovllm.models.checkpoint import ensure_checkpoint

    return ensure_checkpoint("tiny")
