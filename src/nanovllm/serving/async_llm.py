"""`AsyncLLM`: the engine behind `async for`, as vLLM's class of that name.

    event loop      generate: checks, queue limit --> waits for outputs
    tokenizing      text -> Sequence (two threads, and one for long texts)
    steps           one thread: add, abort, step                        (step_thread.py)
    outputs         one thread: tokens -> text, log-probabilities       (answers.py)

It is the same LLMEngine, scheduler and step loop as `LLM`'s, so a request gets the same tokens. The
tokenizers library and the kernels release Python's lock while they work, so tokenizing and
detokenizing go on beside a step.
"""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from queue import SimpleQueue
from typing import Any, Self

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import EngineDeadError, LLMEngine, Prompt
from nanovllm.engine.sequence import Sequence
from nanovllm.models.loader import resolve_model
from nanovllm.models.sampling_defaults import default_params
from nanovllm.outputs import RequestOutput
from nanovllm.requests import several
from nanovllm.sampling_params import SamplingParams
from nanovllm.serving.answers import Answer, OutputKind
from nanovllm.serving.step_thread import Advance, StepThread
from nanovllm.serving.streams import Stream, hand_over

DEFAULT_QUEUE = 1024
"""Requests that may wait beside the max_num_seqs that run."""
TOKENIZING_THREADS = 2
LONG_TEXT = 1 << 16
"""Characters. Longer texts, which take tens of milliseconds and more, have a thread of their own: however
many there are, they do not hold up the tokenizing of others.
"""
RECENT_STEPS = 4096
"""Steps whose times are kept: a server runs for long, and its memory should not grow for hours."""
MOST_COMPOSED = 4
"""Characters of a text that Unicode's normal form may make one of, in a tokenizer that asks for it."""
_LOOK_EVERY_S = 0.02
POLICIES = ("fcfs", "priority")
KINDS = ("cumulative", "delta", "final_only")
Observer = Callable[[float, list[Advance]], None]
"""Called in the output thread with the time after a step and what advanced in it."""


class QueueFullError(RuntimeError):
    """As many requests are unfinished as the engine was told to hold; try again later."""


class AsyncLLM:
    """vLLM's asynchronous interface to one engine.

    model and engine_arguments: as for `LLM`. scheduling_policy: 'fcfs', first come, first served, or
    'priority': requests of a lower `priority` value are served first, and preempted last; equal
    ones in order of arrival. max_queue: how many requests may wait beside the max_num_seqs that can
    run.

    Use it as an asynchronous context manager, or await `shutdown`. Requests may come from several
    event loops.
    """

    def __init__(
        self,
        model: str,
        *,
        scheduling_policy: str = "fcfs",
        max_queue: int = DEFAULT_QUEUE,
        **engine_arguments: Any,
    ) -> None:
        check_settings(scheduling_policy, max_queue)
        engine = LLMEngine(EngineConfig.from_kwargs(model, **engine_arguments))
        engine._step_times = deque(maxlen=RECENT_STEPS)
        self._begin(engine, scheduling_policy, max_queue)

    @classmethod
    def over(
        cls, engine: Any, *, scheduling_policy: str = "fcfs", max_queue: int = DEFAULT_QUEUE
    ) -> Self:
        """The same over an engine that is there and idle. It belongs to the AsyncLLM from then on,
        which closes it.
        """
        check_settings(scheduling_policy, max_queue)
        made = cls.__new__(cls)
        made._begin(engine, scheduling_policy, max_queue)
        return made

    def _begin(self, engine: Any, policy: str, max_queue: int) -> None:
        self.engine, self.scheduling_policy = engine, policy
        self.max_unfinished = engine.config.max_num_seqs + max_queue
        self.observers: list[Observer] = []
        self._turn = threading.Lock()  # of the next three
        self._streams: dict[str, Stream] = {}
        self._num_unfinished = self._num_requests = 0
        self._dead: str | None = None
        self._longest_token: int | None = None
        self._advanced: SimpleQueue[tuple[float, list[Advance]] | None] = SimpleQueue()

        def add(answer: Answer) -> None:
            engine.scheduler.add(answer.seq)

        if policy == "priority":
            try:
                add = import_module("nanovllm.engine.priority").prioritize(engine.scheduler)
            except ValueError:
                engine.close()
                raise
        self._tokenizing = ThreadPoolExecutor(TOKENIZING_THREADS, "nanovllm-tokenize")
        self._tokenizing_long = ThreadPoolExecutor(1, "nanovllm-tokenize-long")
        self._writing = threading.Thread(target=self._write, name="nanovllm-outputs", daemon=True)
        self._writing.start()
        self._steps = StepThread(
            engine, lambda now, advances: self._advanced.put((now, advances)), self._ended, add
        )

    # -- requests ----------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: OutputKind = "cumulative",
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serves one request; yields its outputs as they come, the last one with finished=True.

        sampling_params: None takes those that the checkpoint recommends. request_id: any text that
        no unfinished request has; None makes one. output_kind: each output holds the answer so far
        ('cumulative'), or what was not yielded before ('delta'); 'final_only' yields once, at the
        end. A slow reader gets fewer, larger outputs. With n > 1 an output holds the answers that
        have advanced, by index.

        Closing the iterator, or cancelling the task that reads it, ends the request and frees its
        KV blocks before the next step.

        Raises, at the first iteration: ValueError or TypeError for a request that cannot be served,
        QueueFullError, EngineDeadError. The last also later, when the engine ends.
        """
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        stream, number = self._open(request_id, params, output_kind, priority)
        try:
            await self._submit(stream, number, prompt, params, priority)
            finished = False
            while not finished:
                output = await stream.next()
                finished = output.finished
                yield output
        finally:
            self._close(stream)

    async def abort(self, request_id: str) -> None:
        """Ends a request, whose last output then says finish_reason='abort'. Unknown ids, and those
        of finished requests, are passed over.
        """
        with self._turn:
            stream = self._streams.get(request_id)
            if stream is None:
                return
            stream.is_aborted = True
        self._steps.abort(stream.answers)

    def _open(
        self, request_id: str | None, params: SamplingParams, kind: OutputKind, priority: int
    ) -> tuple[Stream, int]:
        """Registers a request; returns its stream, and how many came before it."""
        if kind not in KINDS:
            raise ValueError(f"output_kind={kind!r} is unknown; allowed are {', '.join(KINDS)}")
        if type(priority) is not int or (priority and self.scheduling_policy != "priority"):
            raise ValueError(
                f"priority={priority!r} is not allowed; give a whole number, and an engine with "
                "scheduling_policy='priority', or leave it out"
            )
        request_id = uuid.uuid4().hex if request_id is None else request_id
        count = getattr(params, "n", 1)
        if count > self.max_unfinished:
            raise ValueError(
                f"n={count} is more than the {self.max_unfinished} requests that may be unfinished (max_num_seqs + "
                "max_queue); lower n or raise max_queue"
            )
        with self._turn:
            self._check_alive()
            if request_id in self._streams:
                raise ValueError(
                    f"request_id {request_id!r} is already in use by an unfinished request"
                )
            if self._num_unfinished + count > self.max_unfinished:
                raise QueueFullError(
                    f"{self._num_unfinished} requests are unfinished, of {self.max_unfinished} that are allowed "
                    "(max_num_seqs + max_queue); try again later"
                )
            number = self._num_requests
            stream = self._streams[request_id] = Stream(request_id, kind, count)
            self._num_unfinished += count
            self._num_requests += count
        return stream, number

    async def _submit(
        self, stream: Stream, number: int, prompt: Prompt, params: SamplingParams, priority: int
    ) -> None:
        arrival = time.perf_counter()
        text = text_of(prompt)
        seqs = await self._in_thread(
            0 if text is None else len(text),
            self._make_sequences,
            stream.request_id,
            prompt,
            params,
            number,
        )
        for index, seq in enumerate(seqs):
            seq.metrics.arrival_time = arrival
            answer = Answer(self.engine, seq, index, stream.kind)
            answer.stream, answer.rank = stream, (priority, number + index)
            stream.answers.append(answer)

        def refused(error: Exception) -> None:
            self._hand_over(stream, stream.fail, error)

        if not self._steps.add(list(stream.answers), refused):
            raise self._dead_error()
        if stream.is_aborted:  # while it was tokenized
            self._steps.abort(stream.answers)

    def _make_sequences(
        self, request_id: str, prompt: Prompt, params: SamplingParams, number: int
    ) -> list[Sequence]:
        """One for each answer. Runs in a tokenizing thread."""
        text = text_of(prompt)
        if text is not None and self.engine.tokenizer is not None:
            # a batch of one, because `encode` keeps Python's lock
            prompt = {"prompt_token_ids": self.engine.tokenizer.encode_batch([text])[0].ids}
        count = getattr(params, "n", 1)
        seqs = []
        for index in range(count):
            name = request_id if count == 1 else f"{index}_{request_id}"
            one = params if count == 1 else several.single(params, index)
            seq = self.engine.make_sequence(name, prompt, one, number + index)
            seq.prompt = text
            seqs.append(seq)
        return seqs

    async def _in_thread(self, length: int, function: Callable[..., Any], *given: Any) -> Any:
        """Calls a function that tokenizes a text of so many characters. Raises ValueError, before
        anything is tokenized, for a text that cannot fit.
        """
        tokenizer = self.engine.tokenizer
        if length > LONG_TEXT and tokenizer is not None:
            if self._longest_token is None:
                vocabulary = tokenizer.get_vocab(with_added_tokens=True)
                self._longest_token = MOST_COMPOSED * max(map(len, vocabulary), default=1)
            room = self.engine.config.max_model_len
            if length > room * self._longest_token:
                raise ValueError(
                    f"the prompt has {length} characters, which are more than max_model_len={room} tokens even if each stood "
                    f"for {self._longest_token} of them, the most that one can: shorten it"
                )
        threads = self._tokenizing_long if length > LONG_TEXT else self._tokenizing
        return await asyncio.get_running_loop().run_in_executor(threads, function, *given)

    def _close(self, stream: Stream) -> None:
        """The reader is gone, or has everything."""
        stream.is_closed = True
        with self._turn:
            del self._streams[stream.request_id]
            self._num_unfinished -= stream.num_answers
        if not stream.is_complete:
            self._steps.abort(stream.answers)

    # -- from the steps to the readers -------------------------------------------------------------

    def _write(self) -> None:
        """The output thread."""
        try:
            while (batch := self._advanced.get()) is not None:
                self._write_outputs(*batch)
        except Exception as error:  # noqa: BLE001  an observer's, or a mistake of ours
            self._dead = f"its output thread failed ({type(error).__name__}: {error})"
            self._steps.stop()
        with self._turn:
            waiting = list(self._streams.values())
        for stream in waiting:
            self._hand_over(stream, stream.fail, self._dead_error())

    def _write_outputs(self, now: float, advances: list[Advance]) -> None:
        for observe in self.observers:
            observe(now, advances)
        outputs: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Any]]] = {}
        for answer, num_tokens, reason in advances:
            answer.last_token_time = now
            if answer.stream.is_closed:
                continue
            try:
                output: Any = answer.output(num_tokens, reason)
            except Exception as error:  # noqa: BLE001  it is one request's, not the engine's
                output = error
                self._steps.abort([answer])
            if output is not None:
                outputs.setdefault(answer.stream.loop, []).append((answer.stream, output))
        for some in outputs.values():
            self._hand_over(some[0][0], _deliver, some)

    def _hand_over(self, stream: Stream, call: Callable[..., None], *given: Any) -> None:
        """Calls on the event loop of a stream; if that is closed, all its requests are aborted."""
        try:
            hand_over(stream.loop, call, *given)
        except RuntimeError:
            with self._turn:
                lost = [one for one in self._streams.values() if one.loop is stream.loop]
            for one in lost:
                self._steps.abort(one.answers)

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def shutdown(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Takes no more requests, and ends the engine. drain: first waits until every unfinished
        request has been read to its end, for at most timeout_s (None: as long as it takes). Readers
        of requests that are cut off get an EngineDeadError. May be called twice.
        """
        with self._turn:
            self._dead = self._dead or "it was shut down"
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while drain and self._streams and (deadline is None or time.monotonic() < deadline):
            await asyncio.sleep(_LOOK_EVERY_S)
        self._steps.stop()
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        self._steps.join()
        self._writing.join()
        self._tokenizing.shutdown()
        self._tokenizing_long.shutdown()

    def _ended(self, error: BaseException | None) -> None:
        """Called in the step thread, last."""
        if error is not None:
            self._dead = f"a step failed ({type(error).__name__}: {error})"
        self._advanced.put(None)

    @property
    def errored(self) -> bool:
        """Whether the engine has ended, or is about to."""
        return self._dead is not None

    async def check_health(self) -> None:
        """Raises EngineDeadError where the engine takes no more requests."""
        self._check_alive()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead_error()

    def _dead_error(self) -> EngineDeadError:
        reason = self._dead or "it has ended"
        return EngineDeadError(f"this engine takes no requests: {reason}; make a new one")

    # -- the rest ----------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Requests, each of n answers counted, that have not been read to their end."""
        return self._num_unfinished

    async def between_steps(self, function: Callable[[Any], Any]) -> Any:
        """Calls function(engine) in the step thread, between two steps, where nothing changes
        meanwhile; returns what it returns. Raises RuntimeError where the engine has ended.
        """
        return await asyncio.wrap_future(self._steps.call(function))

    async def reset_prefix_cache(self) -> None:
        """Forgets every prefix that no running request uses."""
        await self.between_steps(lambda engine: engine.reset_prefix_cache())

    async def in_tokenizing_thread(self, function: Callable[[], Any], length: int) -> Any:
        """Calls a function that tokenizes about `length` characters, beside the event loop and the
        steps. Raises ValueError for more than can fit into the context.
        """
        self._check_alive()
        return await self._in_thread(length, function)

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's recommended parameters, as in `LLM`."""
        return default_params(resolve_model(self.engine.config.model))


def text_of(prompt: Prompt) -> str | None:
    """The text that is to be tokenized; None where there are token ids."""
    text: Any = prompt.get("prompt") if isinstance(prompt, dict) and len(prompt) == 1 else prompt
    return text if isinstance(text, str) else None


def check_settings(policy: str, max_queue: int) -> None:
    """Raises ValueError, saying what is allowed."""
    if policy not in POLICIES:
        raise ValueError(
            f"scheduling_policy={policy!r} is not allowed; it must be {' or '.join(map(repr, POLICIES))}"
        )
    if type(max_queue) is not int or max_queue < 0:
        raise ValueError(
            f"max_queue={max_queue!r} is not allowed; it must be a whole number, 0 or more"
        )


def _deliver(outputs: list[tuple[Stream, Any]]) -> None:
    """On the event loop: gives each stream its output, or its error."""
    for stream, output in outputs:
        if isinstance(output, Exception):
            stream.fail(output)
        else:
            stream.deliver(output)
