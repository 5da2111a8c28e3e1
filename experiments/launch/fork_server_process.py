"""The process that launches are forked from (experiments/launch/fork_server.py): imports the modules that it
is given, then forks on request.

    python -m experiments.launch.fork_server_process torch nanovllm.engine.llm_engine ...

Reads {"arguments": [...], "log": path} a line from standard input, and answers on standard output,
a line each: {"import_s": s} once, then {"pid": n} and {"status": n} for every launch. Ends when its
standard input does. A launch reads the same input, and so ends with the runner as well; while it
lives, the runner writes nothing and this process only waits.
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
from typing import Any


def main(modules: list[str]) -> int:
    begin = time.perf_counter()
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    for name in modules:
        importlib.import_module(name)
    from experiments.launch import engine_process, runner

    assert engine_process  # imported here, so that no launch has to
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print(
            "importing the engine initialized CUDA; a process that has done so cannot fork launches",
            file=sys.stderr,
        )
        return 1
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection of a launch writes to it
    say(answers, {"import_s": time.perf_counter() - begin})
    # unbuffered: what follows is the launch's to read
    with open(0, "rb", buffering=0, closefd=False) as requests:
        while line := requests.readline():
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.close(answers)
                serve(runner.main, request)
            with contextlib.suppress(OSError):  # it may have done so itself, and even have ended
                os.setpgid(pid, pid)
            say(answers, {"pid": pid})
            _, status = os.waitpid(pid, 0)
            say(answers, {"status": os.waitstatus_to_exitcode(status)})
    return 0


def serve(run: Any, request: dict[str, Any]) -> None:
    """The launch: a process group of its own, its output in its log. Never returns."""
    status = 1
    try:
        # whoever comes first: the runner must find a group to end
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
    except BaseException:  # noqa: BLE001  whatever it was, it ends here and is in the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # no exit handlers of the process that it was forked from


def say(answers: int, message: dict[str, Any]) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
