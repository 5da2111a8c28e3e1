"""Fixtures that every test may use."""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from experiments.host import model_files, provenance

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


@pytest.fixture(scope="session", autouse=True)
def _one_environment_report() -> Iterator[None]:
    """torch's report on an interpreter is asked for by every run with a real engine, takes seconds,
    and says the same each time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "environment_report", cache(provenance.environment_report))
        yield


@pytest.fixture(scope="session", autouse=True)
def _digests_in_this_process() -> Iterator[None]:
    """A runner must not import torch, so it has checkpoints prepared and digested by another process,
    which does. Commands that tests start in a process of their own still do so.
    """
    real = model_files._inspect

    @cache
    def inspect(preset: str | None, path: str | None, here: bool) -> Any:
        return real.__wrapped__(preset, path, True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_files, "_inspect", inspect)
        yield


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, replicas, launches and the jobs of a check are forked (tests/support/forks.py): for
    tests of what these processes do, not of how they start.
    """
    from experiments.checking import run as check_run
    from experiments.launch import runner
    from nanovllm.distributed import processes
    from tests.support import forks

    for module in (processes, runner, check_run):
        monkeypatch.setattr(module, "subprocess", forks.module())


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded checkpoint, built once."""
    from nanovllm.models.checkpoint import ensure_checkpoint

    return ensure_checkpoint("tiny")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what is made once in a run of the suite: all processes of pytest-xdist have the same.
    Whoever makes something there holds a lock meanwhile.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def rendered(shared_folder: Path) -> Callable[[str], Path]:
    """The folder of a published study's report as it is rendered today, by the study's name. Each is
    rendered once.
    """
    from reports.claims.published_studies import library
    from reports.page.render import MARKDOWN, render

    def of(name: str) -> Path:
        out = shared_folder / "rendered" / name
        with FileLock(shared_folder / f"rendered-{name.replace('/', '-')}.lock"):
            if not (out / MARKDOWN).is_file():  # the last that is written
                study = library().studies[name]
                render(study.plan, study.records, study.analysis, out)
        return out

    return of
