"""Processes of the engine's own: how they start, talk, fail and end. Loaded with more than one rank
or replica.

Each is a fresh interpreter (subprocess, so a script needs no `if __name__ == "__main__"`) with two
inherited descriptors:

    channel    messages both ways (wire.py); an end of it closed is the order to leave
    lifeline   a pipe that nobody writes to: it closes when the parent ends, however it ends, and
    takes the child with it
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
"""A child that was asked to end and is still there after this long is killed."""


class WorkerError(RuntimeError):
    """A process of the engine (a tensor-parallel rank, a replica) died, hung or failed; the message
    names it.
    """


class Child:
    """The parent's end. `title` is what errors call it; `main` the dotted path of the function that
    it runs with its channel.
    """

    def __init__(self, title: str, main: str, environment: dict[str, str] | None = None) -> None:
        self.title = title
        self.said = ""  # of its failure
        ours, theirs = socket.socketpair()
        lifeline_theirs, lifeline = os.pipe()
        # also where the engine is dropped without close()
        self._cut_lifeline = weakref.finalize(self, os.close, lifeline)
        module, _, function = main.rpartition(".")
        code = f"from nanovllm.distributed.processes import run; from {module} import {function}; run({function})"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(theirs.fileno()), str(lifeline_theirs)],
                pass_fds=[theirs.fileno(), lifeline_theirs],
                stdin=subprocess.DEVNULL,
                # Our sys.path and nothing before it: -c alone would find a statistics.py of the
                # working directory first.
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
        """Raises WorkerError where it has ended or failed, or does not read."""
        try:
            self.channel.send(message, timeout_s)
        except TimeoutError:
            raise WorkerError(
                f"{self.title} hangs: it took no message within {timeout_s:.0f} s"
            ) from None
        except OSError:
            while True:  # what it said before it went, until hear raises
                self.hear(b"", 1.0)

    def hear(self, word: bytes, timeout_s: float) -> bytes | None:
        """What it says after `word`, None while it is silent. Raises WorkerError where it has ended
        or failed.
        """
        try:
            message = self.channel.receive(timeout_s)
        except TimeoutError:
            if self.process.poll() is None:
                return None
            raise WorkerError(self.failure()) from None
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # its end of the channel closes a moment before it is gone
            raise WorkerError(self.failure()) from None
        if message.startswith(b"failed:"):
            self.said = message[7:].decode()
            raise WorkerError(self.failure())
        if not message.startswith(word):
            raise WorkerError(f"{self.title} said {message[:40]!r} where {word!r} was due")
        return message[len(word) :]

    def failure(self) -> str:
        """What is known of its failure."""
        if self.said:
            return f"{self.title} failed:\n{self.said}"
        status = self.process.poll()
        if status is not None and status < 0:
            return f"{self.title} was killed ({signal.Signals(-status).name})"
        return f"{self.title} ended without a word, status {status}"

    @property
    def was_killed(self) -> bool:
        return (self.process.poll() or 0) < 0

    @property
    def has_failed(self) -> bool:
        return bool(self.said) or self.process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        """Alive, and not running (SIGSTOP)."""
        try:
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    def show_where(self) -> None:
        """Has it print where it is, on standard error: for what hangs, before it is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        self._cut_lifeline()


def end(children: Iterable[Child], force: bool) -> None:
    """Ends every child: asked to first (unless force), killed after CLOSE_TIMEOUT_S. Returns when
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
    """The child's end: runs `main` until the channel closes, and tells the parent of any other
    failure.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
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
    """Tells the parent what went wrong, and ends this process at once: its peers may never answer a
    polite goodbye.
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
