"""Forked processes stand for fresh ones in many tests: they behave alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forks

STARTS = [subprocess.Popen, forks.start]
Start = Callable[..., Any]


@pytest.fixture
def ended(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """The status and the output of a process."""

    def run(start: Start, *arguments: str, **options: Any) -> tuple[int, str]:
        with (tmp_path / "out").open("wb") as out:
            process = start(
                [sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT, **options
            )
            status = process.wait(60)
        return status, (tmp_path / "out").read_text()

    return run


@pytest.mark.parametrize("start", STARTS)
def test_status_output_arguments_and_environment(start: Start, ended: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "ONE": "two", "PYTHONPATH": str(tmp_path)}
    (tmp_path / "own_module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    say = "import os, sys, own_module; print(os.environ['ONE'], sys.argv, os.getcwd()); sys.exit(7)"
    status, said = ended(start, "-P", "-c", say, "a", "b", env=environment)
    assert (status, said) == (7, f"own_module ['a', 'b']\ntwo ['-c', 'a', 'b'] {os.getcwd()}\n")
    assert ended(start, "-m", "own_module", "c", env=environment) == (0, "__main__ ['c']\n")
    status, said = ended(start, "-c", "raise ValueError('no')")
    assert status == 1
    assert said.endswith("ValueError: no\n")
    status, said = ended(start, "-c", "import sys; print(sys.stdin.read() == '')")
    assert (status, said) == (0, "True\n")


@pytest.mark.parametrize("start", STARTS)
def test_descriptors_signals_and_the_end_of_its_input(start: Start) -> None:
    reading, writing = os.pipe()
    code = (
        "import os, sys; os.write(int(sys.argv[1]), str(os.getsid(0)).encode()); sys.stdin.read()"
    )
    process = start(
        [sys.executable, "-c", code, str(writing)],
        stdin=subprocess.PIPE,
        pass_fds=[writing],
        start_new_session=True,
    )
    os.close(writing)
    assert int(os.read(reading, 64)) == process.pid, "a session of its own"
    assert psutil.Process(process.pid).ppid() == os.getpid()
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 0
    os.close(reading)

    sleeping = start([sys.executable, "-c", "import time; time.sleep(99)"])
    with pytest.raises(subprocess.TimeoutExpired):
        sleeping.wait(0.05)
    assert sleeping.pid in [child.pid for child in forks.children()]
    sleeping.kill()
    assert sleeping.wait(60) == -signal.SIGKILL
    assert sleeping.pid not in [child.pid for child in forks.children()]


def test_a_fork_has_its_libraries_and_other_processes_are_started(ended: Any) -> None:
    asks = "import sys; print('torch' in sys.modules)"
    assert ended(forks.start, "-c", asks) == (0, "True\n")
    assert ended(subprocess.Popen, "-c", asks) == (0, "False\n")
    with forks.start([sys.executable, "-c", asks], stdout=subprocess.PIPE, text=True) as fresh:
        assert fresh.stdout.read() == "False\n", "its output is read through a pipe"
    with forks.start(["/bin/false"]) as other:
        assert other.wait(60) == 1
