"""The engine's child processes: how they are started, talk, fail and end. Loaded with more than
one rank or replica.

Each is a fresh interpreter (subprocess, so a script needs no `if __name__ == "__main__"`) with two
inherited descriptors:

    channel    messages both ways (wire.py); closing it asks the child to end
    lifeline   a pipe that nobody writes to: it closes when the parent ends, however it ends, and the child ends too
"""

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable

import psutil

from nanovllm.distributed.wire import Channel

CLOSE_TIMEOUT_S = 5.0
"""A child that was asked to end is killed after this long."""


class WorkerError(RuntimeError):
    """A process of the engine (a tensor-parallel rank, a replica) died, hung or failed; the message
    names it.
    """


class Child:
    """The parent's side. title: its name in errors. main: dotted path of the function that it runs
    with its channel. environment: variables beside those of this process.
    """

    def __init__(self, title: str, main: str, environment: dict[str, str] | None = None) -> None:
        self.title = title
        self.said = ""  # its own report of a failure
        ours, theirs = socket.socketpair()
        lifeline_theirs, lifeline = os.pipe()
        # also if the engine is dropped without close()
        self._cut_lifeline = weakref.finalize(self, os.close, lifeline)
        module, _, function = main.rpartition(".")
        code = f"from nanovllm.distributed.processes import run; from {module} import {function}; run({function})"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(theirs.fileno()), str(lifeline_theirs)],
                pass_fds=[theirs.fileno(), lifeline_theirs],
                stdin=subprocess.DEVNULL,
                # Exactly our sys.path: with -c alone, a statistics.py in the working directory would
                # shadow the standard library's.
                env={
                    **os.environ,
                    **(environment or {}),
                    "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                },
            )
        finally:
            theirs.close()
            os.close(lifeline_theirs)
        self.channel = Channel(ours)

    def tell(self, message: bytes, timeout_s: float) -> None:
        """Sends a message. Raises WorkerError where the child has ended or failed, or does not
        read.
        """
        try:
            self.channel.send(message, timeout_s)
        except TimeoutError:
            raise WorkerError(
                f"{self.title} hangs: it took no message within {timeout_s:.0f} s"
            ) from None
        except OSError:
            while True:  # read its last messages, until hear raises
                self.hear(b"", 1.0)

    def hear(self, word: bytes, timeout_s: float) -> bytes | None:
        """The rest of its message after `word`; None if it sends nothing within timeout_s. Raises
        WorkerError where it has ended or failed.
        """
        try:
            message = self.channel.receive(timeout_s)
        except TimeoutError:
            if self.process.poll() is None:
                return None
            raise WorkerError(self.failure()) from None
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # its end of the channel closes a moment before it exits
            raise WorkerError(self.failure()) from None
        if message.startswith(b"failed:"):
            self.said = message[7:].decode()
            raise WorkerError(self.failure())
        if not message.startswith(word):
            raise WorkerError(f"{self.title} sent {message[:40]!r} where {word!r} was expected")
        return message[len(word) :]

    def failure(self) -> str:
        """What is known about the failure of the process."""
        if self.said:
            return f"{self.title} failed:\n{self.said}"
        status = self.process.poll()
        if status is not None and status < 0:
            return f"{self.title} was killed ({signal.Signals(-status).name})"
        return f"{self.title} ended without reporting an error, status {status}"

    @property
    def was_killed(self) -> bool:
        return (self.process.poll() or 0) < 0

    @property
    def has_failed(self) -> bool:
        return bool(self.said) or self.process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        """Whether it is alive but stopped (SIGSTOP)."""
        try:
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    def show_where(self) -> None:
        """Makes it print its stack traces to standard error, before a hung process is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        self._cut_lifeline()


def end(children: Iterable[Child], force: bool) -> None:
    """Ends every child: asked first unless `force`, and killed after CLOSE_TIMEOUT_S. Returns when
    all are gone.
    """
    children = list(children)
    for child in children:
        child.channel.close()
        if force:
            child.process.kill()
    deadline = time.monotonic() + CLOSE_TIMEOUT_S
    for child in children:
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        child.close()


def run(main: Callable[[Channel], None]) -> None:
    """The child's side: runs `main` until the channel closes, and reports any other failure to the
    parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    faulthandler.register(signal.SIGUSR1)  # Child.show_where
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[2]),), daemon=True).start()
    try:
        main(channel)
    except (EOFError, ConnectionError):
        return  # the engine was closed, or is gone
    except BaseException:  # noqa: BLE001  whatever it was, the parent must hear of it
        report_failure(channel)


def report_failure(channel: Channel) -> None:
    """Reports the current exception to the parent and ends this process at once, as its peers may
    never answer a clean shutdown.
    """
    text = traceback.format_exc()
    try:
        channel.send(b"failed:" + text.encode(), timeout_s=5)
    except OSError:
        sys.stderr.write(text)
        sys.stderr.flush()
    os._exit(1)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)
