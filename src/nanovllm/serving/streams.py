"""What one call of `AsyncLLM.generate` waits for.

    step thread --tokens--> output thread --outputs--> Stream on the client's event loop --> client

A client that reads slowly does not make outputs pile up: those that it has not read are merged, as
in vLLM. So a stream holds one output at most, whose size is bounded by max_tokens.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from nanovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.serving.answers import Answer, OutputKind


def hand_over(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *given: Any) -> None:
    """Runs `call` on the event loop of a client, from another thread. Raises RuntimeError where the
    loop is closed.
    """
    loop.call_soon_threadsafe(call, *given)


class Stream:
    """The answers to one prompt. Belongs to the event loop that is running when it is made; all its
    methods are called there.
    """

    def __init__(self, request_id: str, kind: OutputKind, num_answers: int) -> None:
        self.request_id, self.kind = request_id, kind
        self.num_answers = self._num_open = num_answers
        self.loop = asyncio.get_running_loop()
        self.answers: list[Answer] = []  # none while the prompt is tokenized
        self.is_aborted = self.is_closed = False  # asked to end; nobody reads it any more
        self._pending: dict[int, CompletionOutput] = {}
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Whether the last output of every answer is here."""
        return self._num_open == 0

    def deliver(self, completion: CompletionOutput) -> None:
        """Takes an output of one of the answers."""
        if completion.finish_reason is not None:
            self._num_open -= 1
        earlier = self._pending.get(completion.index)
        if earlier is not None and self.kind == "delta":
            completion = merged(earlier, completion)
        self._pending[completion.index] = completion
        self._news.set()

    def fail(self, error: Exception) -> None:
        """No more outputs will come; `next` raises the error after those that came before."""
        if not self.is_complete:
            self._error = error
            self._news.set()

    async def next(self) -> RequestOutput:
        """The next output, with every answer that has advanced. Raises what `fail` was given."""
        while not self._ready():
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        taken, self._pending = self._pending, {}
        return self._output([taken[index] for index in sorted(taken)])

    def _ready(self) -> bool:
        return bool(self._pending) and (self.kind != "final_only" or self.is_complete)

    def _output(self, completions: list[CompletionOutput]) -> RequestOutput:
        seq = self.answers[0].seq
        return RequestOutput(
            self.request_id,
            seq.prompt,
            seq.token_ids[: seq.num_prompt_tokens],
            completions,
            self.is_complete,
            self._metrics(),
            seq.num_cached_tokens,
            getattr(seq, "prompt_logprobs", None),
        )

    def _metrics(self) -> RequestMetrics:
        """Times of the first token and of the last, over all answers."""
        every = [answer.seq.metrics for answer in self.answers]
        if len(every) == 1:
            return every[0]
        started = [m.first_token_time for m in every if m.first_token_time is not None]
        ended = [m.finished_time for m in every if m.finished_time is not None]
        return RequestMetrics(
            every[0].arrival_time,
            min(started, default=None),
            max(ended) if len(ended) == len(every) else None,
        )


def merged(earlier: CompletionOutput, later: CompletionOutput) -> CompletionOutput:
    """Two deltas of one answer as one."""
    logprobs = later.logprobs
    if earlier.logprobs is not None and later.logprobs is not None:
        logprobs = earlier.logprobs + later.logprobs
    return CompletionOutput(
        later.index,
        earlier.text + later.text,
        earlier.token_ids + later.token_ids,
        later.cumulative_logprob,
        logprobs,
        later.finish_reason,
        later.stop_reason,
    )
