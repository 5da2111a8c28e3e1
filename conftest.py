"""What every test process needs: one thread for the small tensors, bytecode, the CPU time of each
test, and for `-n auto` the number of processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Read when the libraries are loaded, here and in the processes that tests start. A second thread
# costs more than it brings: it waits by spinning on a core that another test process needs.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# Many containers set it. Then the processes that tests start would compile what they import again, each
# of them, and pytest the tests. `make setup` writes the environment's bytecode for the same reason.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

pytest_plugins = ["tests.support.spent"]
MOST_PROCESSES = 8
"""More would wait for the longest tests."""
PROCESS_BYTES = 3 << 30
"""Of memory for a test process and the engines that it starts."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Also where the shell says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: the cores that this process may use, as far as there is memory. 0: no workers,
    the tests run in this process.
    """
    from nanovllm.host_limits import cpu_cores

    processes = min(cpu_cores(), psutil.virtual_memory().available // PROCESS_BYTES, MOST_PROCESSES)
    return processes if processes > 1 else 0
