"""The fork server (see experiments/launch/fork_server.py): imports the given modules, then forks
engine processes on request.

    python -m experiments.launch.fork_server_process torch nanovllm.engine.llm_engine ...

Reads requests from standard input, one {"arguments": [...], "log": path} per line, and writes
answers to standard output: {"import_s": s} once, then {"pid": n} and {"status": n} for each engine
process. Ends when its standard input is closed. An engine process reads the same input and so ends
with the runner, too; while it runs, the runner writes nothing and this process only waits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any, TypedDict


class Request(TypedDict):
    """Arguments of `python -m experiments.launch`, and the file for its output."""

    arguments: list[str]
    log: str


def main(modules: list[str]) -> int:
    begin = time.perf_counter()
    answers = os.dup(1)
    os.dup2(2, 1)  # keeps output of the imported libraries apart from the answers
    for name in modules:
        importlib.import_module(name)
    from experiments.launch import engine_process, runner

    assert engine_process  # imported here, so that forks do not have to
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print(
            "importing the engine initialized CUDA; after that, engine processes cannot be forked",
            file=sys.stderr,
        )
        return 1
    gc.collect()
    gc.freeze()  # so that garbage collection in a fork does not copy shared pages
    say(answers, {"import_s": time.perf_counter() - begin})
    # unbuffered: what follows is read by the engine process
    with open(0, "rb", buffering=0, closefd=False) as requests:
        while line := requests.readline():
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.close(answers)
                serve(runner.main, request)
            with contextlib.suppress(OSError):  # it may have done so already, or have ended
                os.setpgid(pid, pid)
            say(answers, {"pid": pid})
            _, status = os.waitpid(pid, 0)
            say(answers, {"status": os.waitstatus_to_exitcode(status)})
    return 0


def serve(run: Any, request: Request) -> None:
    """The engine process: a process group of its own, with its output in a log. Never returns."""
    status = 1
    try:
        # both processes try this, because the runner must find a group to kill
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        gc.unfreeze()
        status = run(request["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  any error ends the process and goes to the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without the exit handlers of the fork server


def say(answers: int, message: dict[str, float]) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
