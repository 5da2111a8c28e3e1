"""Processes of the engine without the seconds that they take to import torch: forked from a process
that has imported it.

`start` stands where `subprocess.Popen` does in a module whose processes are not what a test is about
(the fixture `forked_processes`). A process that it starts runs the same code with the same arguments,
descriptors and environment as a fresh interpreter would; only what was imported is shared. It is a
child of this process like any other: it is waited for, killed and counted in CPU seconds here.

Tests of the start itself use real processes: fresh interpreters, module paths, signals of a shell.
Linux only; elsewhere `start` is `subprocess.Popen`. No torch here: a process imports this module.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from functools import cache
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

IMPORTED = (
    "nanovllm.distributed.data_parallel",
    "nanovllm.distributed.rank",
    "experiments.checking.serve",
    "experiments.launch.runner",
)
"""What ranks, replicas, jobs of a check and launches import first, torch among it."""
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_FREE_DESCRIPTORS = 500  # above those that a process was given


class Fork:
    """A forked process, with what the engine and the laboratory use of `subprocess.Popen`."""

    def __init__(self, pid: int, args: list[str], stdin: Any) -> None:
        self.pid, self.args, self.stdin = pid, args, stdin
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # psutil waited for it
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline, pause_s = time.monotonic() + (timeout or 0.0), 0.001
        while self.poll() is None:
            if timeout is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks, and this side of it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"from tests.support.forks import serve; serve({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        theirs.close()
        self._socket, self._turn = ours, threading.Lock()
        atexit.register(self.close)

    def fork(self, request: dict[str, Any], descriptors: list[int]) -> int:
        """The pid of a new process, which is a child of this one."""
        with self._turn:
            _adopt_orphans(True)  # the process that forks it ends at once
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
                answer = self._socket.recv(64)
            finally:
                _adopt_orphans(False)
        if not answer:
            raise RuntimeError(f"the process that forks has ended: status {self.process.wait()}")
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self.process.wait()


@cache
def server() -> Server:
    """One for the whole run of pytest (in this process), started when it is first needed."""
    return Server()


def start(args: list[str], **options: Any) -> Any:
    """`subprocess.Popen(args, **options)`, forked if it can be: this Python with -c or -m, and none of
    its output is read through a pipe.
    """
    known = {"stdin", "stdout", "stderr", "pass_fds", "env", "start_new_session"}
    call = [argument for argument in args[1:] if argument != "-P"]
    stdin, stdout, stderr = (options.get(name) for name in ("stdin", "stdout", "stderr"))
    if (
        sys.platform != "linux"
        or args[0] != sys.executable
        or call[0] not in ("-c", "-m")
        or set(options) - known
        or stdin not in (None, subprocess.DEVNULL, subprocess.PIPE)
        or stdout in (subprocess.DEVNULL, subprocess.PIPE)
        or stderr not in (None, subprocess.STDOUT)
    ):
        return subprocess.Popen(args, **options)
    given = {number: number for number in options.get("pass_fds", ())}
    opened, ours = [], None
    if stdin == subprocess.PIPE:
        theirs, writing = os.pipe()
        opened, ours = [theirs], os.fdopen(writing, "wb", buffering=0)
        given[0] = theirs
    else:
        given[0] = os.open(os.devnull, os.O_RDONLY)
        opened = [given[0]]
    given[1] = 1 if stdout is None else stdout if isinstance(stdout, int) else stdout.fileno()
    given[2] = 2 if stderr is None else given[1]
    request = {
        "call": call,
        "environment": dict(options.get("env") or os.environ),
        "folder": os.getcwd(),
        "session": bool(options.get("start_new_session")),
        "targets": list(given),
    }
    try:
        pid = server().fork(request, list(given.values()))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return Fork(pid, args, ours)


def module() -> SimpleNamespace:
    """`subprocess`, for a module whose processes are to be forked."""
    found = {name: getattr(subprocess, name) for name in subprocess.__all__}
    return SimpleNamespace(**{**found, "Popen": start})


def children() -> list[psutil.Process]:
    """The processes that this one and its children have started and that live, but for the server."""
    own = server().process.pid if server.cache_info().currsize else None
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid != own and process.status() != psutil.STATUS_ZOMBIE
    ]


def _adopt_orphans(adopt: bool) -> None:
    """Whether the kernel makes this process the parent of descendants whose parent has ended."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


# -- in the server ---------------------------------------------------------------------------------


def serve(control: int) -> None:
    """Forks until its socket closes. A process is forked twice, so that its parent ends and the one
    that asked for it becomes its parent.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    asked = socket.socket(fileno=control)
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 20, 64)
        if not message:
            return
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork() == 0:
                asked.close()
                os.close(told)
                _become(json.loads(message), descriptors, tell)
            os._exit(0)
        os.close(tell)
        os.waitpid(between, 0)
        asked.send(os.read(told, 64))
        for descriptor in (told, *descriptors):
            os.close(descriptor)


def _become(request: dict[str, Any], descriptors: list[int], tell: int) -> NoReturn:
    """Runs what was asked for as a fresh interpreter would, and ends with its status."""
    status = 1
    try:
        if request["session"]:
            os.setsid()
        os.write(tell, str(os.getpid()).encode())  # whoever asked may kill the group now
        os.close(tell)
        high = [fcntl.fcntl(d, fcntl.F_DUPFD, _FREE_DESCRIPTORS) for d in descriptors]
        for descriptor in descriptors:
            os.close(descriptor)
        for target, descriptor in zip(request["targets"], high, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        own = request["environment"].get("PYTHONPATH", "")
        sys.path[:0] = filter(None, own.split(os.pathsep))  # before those of the server
        (kind, what), arguments = request["call"][:2], request["call"][2:]
        sys.argv[:] = ["-c" if kind == "-c" else what, *arguments]
        if kind == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for_ever(channel: Any) -> None:
    """The main function of a rank whose device never answers: it does not see that its channel has
    closed.
    """
    time.sleep(99)
