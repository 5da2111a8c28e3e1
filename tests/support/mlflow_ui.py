"""`mlflow ui` as a user types it, in a folder that holds a database."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def mlflow_ui(root: Path, timeout_s: float = 300) -> Iterator[str]:
    """Its address, once it answers. Raises TimeoutError, with the end of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    port = address.rpartition(":")[2]
    options = ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "ui", *options]
    log = root / "ui.log"
    with (
        log.open("w") as out,
        subprocess.Popen(command, cwd=root, stdout=out, stderr=out, start_new_session=True) as ui,
    ):
        try:
            until = time.monotonic() + timeout_s
            while not _answers(address):
                if time.monotonic() > until or ui.poll() is not None:
                    raise TimeoutError(f"mlflow ui does not answer: {log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ui.pid, signal.SIGKILL)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
