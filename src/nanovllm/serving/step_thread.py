"""The thread that runs the engine's steps. Nobody else touches the engine while it lives.

    other threads --commands--> Inbox --between two steps--> engine.advance() --what advanced--> publish

It sleeps while there is nothing to compute. Tokenization, detokenization and delivery are the
business of other threads: between two steps it only adds and aborts requests, and counts tokens.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from nanovllm.serving.answers import Answer

Advance = tuple[Answer, int, str | None]
"""An answer, how many tokens it has, and why it ended (None: it goes on)."""
Command = Callable[[], None]


class Inbox:
    """Commands in the order in which they came. Once closed it takes none."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._commands: list[Command] = []
        self._closed = False

    def put(self, command: Command) -> bool:
        """False where it was closed: the command will never run."""
        with self._turn:
            if not self._closed:
                self._commands.append(command)
                self._turn.notify()
            return not self._closed

    def take(self, wait: bool) -> list[Command]:
        """All commands; waits for one if there is none and `wait` says so."""
        with self._turn:
            while wait and not self._commands:
                self._turn.wait()
            taken, self._commands = self._commands, []
            return taken

    def close(self) -> None:
        with self._turn:
            self._closed, self._commands = True, []


class StepThread:
    """Runs an LLMEngine, which it closes when it ends.

    publish(now, advances) is called after each step in which something advanced, and after aborts,
    with the time of time.perf_counter(). ended(error) is called once, last: error is what ended the
    engine, None after `stop`. add_to: puts a sequence into the scheduler; scheduler.add as a rule.
    """

    def __init__(
        self,
        engine: Any,
        publish: Callable[[float, list[Advance]], None],
        ended: Callable[[BaseException | None], None],
        add_to: Callable[[Answer], None],
    ) -> None:
        self._engine, self._publish, self._ended, self._add_to = engine, publish, ended, add_to
        self._inbox = Inbox()
        self._running: dict[str, Answer] = {}
        self._stopped = False
        self._asked: set[Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="nanovllm-steps", daemon=True)
        self._thread.start()

    def add(self, answers: list[Answer], refused: Callable[[Exception], None]) -> bool:
        """Queues the answers to one prompt, all or none. refused: called in the step thread with the
        ValueError of the scheduler. False where the thread has ended.
        """

        def command() -> None:
            queued: list[Answer] = []
            try:
                for answer in answers:
                    self._add_to(answer)
                    queued.append(answer)
            except ValueError as error:
                for answer in queued:
                    self._engine.abort(answer.seq.request_id)
                refused(error)
                return
            self._running.update((answer.seq.request_id, answer) for answer in queued)

        return self._inbox.put(command)

    def abort(self, answers: Iterable[Answer]) -> None:
        """Ends those that still run and frees their blocks, before the next step."""

        def command() -> None:
            ended: list[Advance] = []
            for answer in answers:
                # another request may have the same id by now
                if self._running.get(answer.seq.request_id) is answer:
                    del self._running[answer.seq.request_id]
                    self._engine.abort(answer.seq.request_id)
                    ended.append((answer, answer.seq.num_output_tokens, "abort"))
            if ended:
                self._publish(time.perf_counter(), ended)

        self._inbox.put(command)

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Calls function(engine) between two steps. The future holds what it returns or raises."""
        result: Future[Any] = Future()

        def command() -> None:
            if not result.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                result.set_result(function(self._engine))
            except Exception as error:  # noqa: BLE001  it is the caller's
                result.set_exception(error)

        self._asked.add(result)
        result.add_done_callback(self._asked.discard)
        if not self._inbox.put(command):
            self._refuse_asked()
        return result

    def _refuse_asked(self) -> None:
        for result in list(self._asked):
            with contextlib.suppress(InvalidStateError):  # the other thread was faster
                result.set_exception(RuntimeError("the engine has ended"))

    def stop(self) -> None:
        """Ends the thread after the step that is running."""

        def command() -> None:
            self._stopped = True

        self._inbox.put(command)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        cause: BaseException | None = None
        try:
            while not self._stopped:
                for command in self._inbox.take(not self._engine.has_unfinished_requests()):
                    command()
                if not self._stopped and self._engine.has_unfinished_requests():
                    self._step()
        except BaseException as error:  # noqa: BLE001  every client that waits must hear of it
            cause = error
        self._inbox.close()
        self._refuse_asked()
        try:
            self._engine.close()
        finally:
            self._ended(cause)

    def _step(self) -> None:
        advances: list[Advance] = []
        for seq in self._engine.advance():
            answer, reason = self._running[seq.request_id], seq.finish_reason
            advances.append((answer, seq.num_output_tokens, reason))
            if reason is not None:
                del self._running[seq.request_id]
        if advances:
            self._publish(time.perf_counter(), advances)
