"""Launches forked from a process that has imported their libraries and done nothing else: the
runner's side. Standard library only.

Importing PyTorch takes two to eight seconds, often more than the rest of a launch. So a study may
ask (`measurement.preload`) for its launches to be forked from a `Nursery`: an interpreter that
imports the engine's libraries, touches no device, computes nothing, and then waits
(experiments/launch/fork_server_process.py). Each launch is still a process of its own, with a device context,
weights, caches and random numbers of its own; what launches of one nursery share is the state right
after the imports, the layout of memory included. A nursery serves one block: all cells of a block
share that, and it differs from block to block.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

IMPORT_TIMEOUT_S = 180.0


class PreloadError(Exception):
    """A nursery that did not come up, or has ended; the message says what it last printed."""


class Forked:
    """A launch that a nursery forked; as much of subprocess.Popen's interface as the runner needs."""

    stdin = None
    """The nursery's own standard input is what tells it that the runner has ended."""

    def __init__(self, pid: int, nursery: Nursery) -> None:
        self.pid, self._nursery, self.returncode = pid, nursery, None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; negative for the signal that killed it. Raises
        subprocess.TimeoutExpired.
        """
        if self.returncode is None:
            self.returncode = self._nursery.hear("status", timeout)
        assert self.returncode is not None
        return self.returncode


class Nursery:
    """A process that waits with its libraries imported. Comes up while the caller goes on; close
    it, or it ends with the caller.
    """

    def __init__(
        self, python: str, environment: dict[str, str], modules: tuple[str, ...], log: Path
    ) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [python, "-m", "experiments.launch.fork_server_process", *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                env=environment,
            )
        self._buffer = b""
        self._import_s: float | None = None

    @property
    def import_s(self) -> float:
        """Seconds that the imports took; waits for their end. Raises PreloadError."""
        if self._import_s is None:
            self._import_s = self.hear("import_s", IMPORT_TIMEOUT_S)
        return self._import_s

    def start(self, arguments: list[str], log: Path) -> Forked:
        """Forks a process that does what `python -m experiments.launch` does with these arguments,
        its output in `log`.

        Raises PreloadError.
        """
        _ = self.import_s  # it is up, or this says why not
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"arguments": arguments, "log": str(log)}).encode() + b"\n"
            )
            self._process.stdin.flush()
        except OSError as error:
            raise PreloadError(self._ended()) from error
        return Forked(int(self.hear("pid", IMPORT_TIMEOUT_S)), self)

    def hear(self, word: str, timeout: float | None) -> Any:
        """The next message, which is about `word`. Raises subprocess.TimeoutExpired, PreloadError."""
        assert self._process.stdout is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise subprocess.TimeoutExpired(
                    "experiments.launch.fork_server_process", timeout or 0.0
                )
            if not (more := os.read(self._process.stdout.fileno(), 4096)):
                raise PreloadError(self._ended())
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if word not in message:
            raise PreloadError(
                f"the process that launches are forked from said {message} where {word} was due"
            )
        return message[word]

    def close(self) -> None:
        """Ends the process; a launch that it forked ends as well."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # a request that it did not live to read
                    stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.unlink(missing_ok=True)

    def _ended(self) -> str:
        last = (
            self._log.read_text(errors="replace").strip().splitlines()[-1:]
            if self._log.exists()
            else []
        )
        return f"the process that launches are forked from has ended: {last[0] if last else 'it printed nothing'}"
