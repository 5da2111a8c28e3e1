"""The runner's side of the fork server, which forks engine processes that have their libraries
imported already. Standard library only.

Importing PyTorch takes two to eight seconds, often more than the rest of a launch. With
`measurement.preload`, engine processes are forked from a `ForkServer`: an interpreter that imports
the engine's libraries, touches no device, computes nothing, and then waits for requests
(experiments/launch/fork_server_process.py). Each launch still has its own process, device context,
weights, caches and random numbers. Forks of one server share the state after the imports, including
the memory layout. A fork server is used for one block, so all cells of a block share that state,
and it varies between blocks.
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


class ForkServerError(Exception):
    """A fork server that did not start, or has ended; the message holds its last output."""


class Forked:
    """A forked engine process, with the part of subprocess.Popen's interface that the runner needs."""

    stdin = None
    """The process watches the fork server's standard input for the end of the runner."""

    def __init__(self, pid: int, fork_server: ForkServer) -> None:
        self.pid, self._fork_server, self.returncode = pid, fork_server, None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; negative for the signal that killed it. Raises
        subprocess.TimeoutExpired.
        """
        if self.returncode is None:
            self.returncode = self._fork_server.hear("status", timeout)
        assert self.returncode is not None
        return self.returncode


class ForkServer:
    """A process that waits with imported libraries for requests to fork. It starts in the
    background, and ends when it is closed or when the caller ends.
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
        """The duration of the imports in seconds; waits for their end. Raises ForkServerError."""
        if self._import_s is None:
            self._import_s = self.hear("import_s", IMPORT_TIMEOUT_S)
        return self._import_s

    def start(self, arguments: list[str], log: Path) -> Forked:
        """Forks a process that runs `python -m experiments.launch` with these arguments and writes
        its output to `log`. Raises ForkServerError.
        """
        _ = self.import_s  # waits until the server is ready
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"arguments": arguments, "log": str(log)}).encode() + b"\n"
            )
            self._process.stdin.flush()
        except OSError as error:
            raise ForkServerError(self._ended()) from error
        return Forked(int(self.hear("pid", IMPORT_TIMEOUT_S)), self)

    def hear(self, word: str, timeout: float | None) -> Any:
        """The value of `word` in the next message. Raises subprocess.TimeoutExpired,
        ForkServerError.
        """
        assert self._process.stdout is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise subprocess.TimeoutExpired(
                    "experiments.launch.fork_server_process", timeout or 0.0
                )
            if not (more := os.read(self._process.stdout.fileno(), 4096)):
                raise ForkServerError(self._ended())
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if word not in message:
            raise ForkServerError(f"the fork server sent {message} where {word} was expected")
        return message[word]

    def close(self) -> None:
        """Ends the fork server and the engine process that it forked."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # it has ended with an unread request
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
        return f"the fork server has ended: {last[0] if last else 'it printed nothing'}"
