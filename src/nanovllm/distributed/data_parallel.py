"""data_parallel_size > 1: independent replicas of the engine behind one `generate`. Loaded only
when on.

    ReplicatedLLM   prompts  --by expected work-->  replica 0 .. n-1    a process each: a whole engine, on GPUs of its own
                    outputs, in the order of the prompts  <--

Replicas exchange nothing, so they scale as far as the work can be balanced. Each holds all weights
and has a prefix cache of its own. A request's random numbers are the same as in a single engine.
"""

import dataclasses
import logging
import os
import pickle
import threading
import time
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from typing import Any, Self

import torch

from nanovllm.config import EngineConfig
from nanovllm.distributed.processes import Child, WorkerError, end
from nanovllm.distributed.sharing import expected_work, share_out
from nanovllm.distributed.wire import Channel
from nanovllm.engine.llm_engine import (
    LLM,
    EngineDeadError,
    Params,
    Prompt,
    as_batch,
    load_tokenizer,
    one_at_a_time,
)
from nanovllm.engine.sequence import Sequence
from nanovllm.gpu.machine import LOG, require_gpus
from nanovllm.models.loader import resolve_model
from nanovllm.models.sampling_defaults import default_params
from nanovllm.outputs import RequestOutput
from nanovllm.requests import several
from nanovllm.sampling_params import SamplingParams

START_TIMEOUT_S = 600.0
STEP_TIMEOUT_S = {"cuda": 25.0, "cpu": 300.0}
"""A replica hangs if it works and ends no step for this long. On a CPU a step may be that of a very
long prompt.
"""
_LOOK_EVERY_S = 0.2
_CHARACTERS_PER_TOKEN = 4
REPLICA_MAIN = "nanovllm.distributed.data_parallel.main"
_Request = tuple[int, Prompt, SamplingParams]
"""Its number among all requests of the front end, its prompt, its parameters."""


class ReplicatedLLM:
    """The interface of LLM over several replicas. Raises WorkerError, naming the replica, when one
    dies or hangs.
    """

    def __init__(self, config: EngineConfig) -> None:
        switches = config.optimizations
        self.size, ranks = switches.data_parallel_size, switches.tensor_parallel_size
        on_gpus = config.device != "cpu" and torch.cuda.is_available()
        if on_gpus:
            require_gpus(
                self.size * ranks,
                f"data_parallel_size={self.size} with tensor_parallel_size={ranks}",
            )
        self.config = dataclasses.replace(
            config, optimizations=dataclasses.replace(switches, data_parallel_size=1)
        )
        self._timeout_s = STEP_TIMEOUT_S["cuda" if on_gpus else "cpu"]
        self._num_requests, self._dispatched = 0, 0
        self._turn = threading.RLock()
        self._dead: str | None = None
        self._counters: list[dict[str, int]] = []
        self._toggles: list[dict[str, Any]] = []
        self._children: list[Child] = []
        num_threads = max(1, torch.get_num_threads() // self.size)
        try:
            for replica in range(self.size):
                gpus = _visible_gpus(replica * ranks, ranks) if on_gpus else {}
                self._children.append(Child(f"replica {replica}", REPLICA_MAIN, gpus))
                self._children[-1].tell(
                    pickle.dumps((self.config, num_threads, replica)), START_TIMEOUT_S
                )
            resolved = self._answers(b"ready", START_TIMEOUT_S)
        except BaseException:
            self._end("it did not start", force=True)
            raise
        self._resolved: dict[str, Any] = resolved[0]
        self._read_counters("stats")

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's recommended parameters, which `generate` uses where none are given, as
        in vLLM.
        """
        return default_params(resolve_model(self.config.model))

    @cached_property
    def tokenizer(self) -> Any:
        """The front end's own, for `chat`; None with skip_tokenizer_init."""
        return (
            None
            if self.config.skip_tokenizer_init
            else load_tokenizer(self.config.tokenizer or self.config.model)
        )

    get_tokenizer = LLM.get_tokenizer
    chat = LLM.chat

    @one_at_a_time
    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Runs every prompt to its end; outputs are in the order of the prompts. Raises ValueError
        or TypeError before anything runs if one of them is not valid.
        """
        self._check_alive()
        batch = as_batch(prompts, sampling_params, self.get_default_sampling_params)
        if any(params.n > 1 for _, params in batch):
            return several.generate(self, batch, use_tqdm)
        requests = [
            (number, prompt, params)
            for number, (prompt, params) in enumerate(batch, self._num_requests)
        ]
        longest = self._resolved["max_model_len"]
        work = [
            expected_work(_length(prompt), min(params.max_tokens, longest))
            for prompt, params in batch
        ]
        shares = share_out(work, self.size)
        checks = [("check", [requests[i] for i in share]) for share in shares]
        answers = self._ask(b"checked", checks)
        refusals = [refusal for refusal in answers if refusal is not None]
        if refusals:
            raise min(refusals, key=lambda refusal: refusal[:2])[2]
        self._num_requests += len(batch)
        self._dispatched += sum(map(len, shares[1:]))
        answers = self._ask(b"outputs", [("run",)] * self.size)
        self._read_counters("stats")
        if errors := [answer for answer in answers if isinstance(answer, Exception)]:
            raise errors[0]
        outputs: dict[int, RequestOutput] = {}
        for share, answer in zip(shares, answers, strict=True):
            outputs |= dict(zip(share, answer, strict=True))
        return [outputs[i] for i in range(len(batch))]

    # -- evidence: sums over replicas --------------------------------------------------------------

    def resolved_config(self) -> dict[str, Any]:
        """The configuration of one replica (its KV cache, its ranks), and the number of replicas."""
        switches = {**self._resolved["optimizations"], "data_parallel_size": self.size}
        return {**self._resolved, "optimizations": switches}

    def stats(self) -> dict[str, int]:
        names = {name for counters in self._counters for name in counters}
        return {
            name: sum(counters.get(name, 0) for counters in self._counters)
            for name in sorted(names)
        }

    def toggles(self) -> dict[str, dict[str, Any]]:
        """As in one engine. data_parallel_size engages with each request that another replica than
        the first serves.
        """
        result = {}
        for name, toggle in self._toggles[0].items():
            every = [toggles[name] for toggles in self._toggles]
            found = [t["opportunity"] for t in every if t["opportunity"] is not None]
            result[name] = toggle | {
                "engaged": sum(t["engaged"] for t in every),
                "opportunity": sum(found) if found else None,
            }
        result["data_parallel_size"] |= {"level": self.size, "engaged": self._dispatched}
        return result

    def step_times(self) -> list[tuple[float, int, int]]:
        """Empty: steps of different replicas overlap, so no sum of them is a duration."""
        return []

    @one_at_a_time
    def reset_stats(self) -> None:
        self._dispatched = 0
        self._read_counters("reset_stats")

    @one_at_a_time
    def reset_prefix_cache(self) -> None:
        self._read_counters("reset_prefix_cache")

    # -- life --------------------------------------------------------------------------------------

    @one_at_a_time
    def close(self) -> None:
        """Ends every replica. May be called twice."""
        if self._dead is None:
            self._end("it was closed", force=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self, reason: str, force: bool) -> None:
        self._dead = reason
        end(self._children, force)
        self._children = []

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"this engine takes no requests: {self._dead}; make a new one")

    def _read_counters(self, command: str) -> None:
        self._check_alive()
        self._counters, self._toggles = map(
            list, zip(*self._ask(b"counters", [(command,)] * self.size), strict=True)
        )

    def _ask(self, word: bytes, commands: SequenceOf[tuple[Any, ...]]) -> list[Any]:
        """Every replica's answer to its command. Any exception ends the engine, because an unread
        answer would be taken for that of the next command. Commands are therefore serialized before
        anything is sent.
        """
        messages = [pickle.dumps(command) for command in commands]
        try:
            for child, message in zip(self._children, messages, strict=True):
                child.tell(message, self._timeout_s)
            return self._answers(word, self._timeout_s)
        except BaseException as error:
            self._end(f"a replica failed ({error})", force=True)
            raise

    def _answers(self, word: bytes, timeout_s: float) -> list[Any]:
        """Every replica's answer. Raises WorkerError where one ends, fails, is stopped, or neither
        answers nor ends a step.
        """
        answers: dict[int, Any] = {}
        heard = [time.monotonic()] * self.size
        while len(answers) < self.size:
            for replica, child in enumerate(self._children):
                if replica in answers:
                    continue
                message = child.hear(b"", _LOOK_EVERY_S / self.size)
                if message is not None:
                    heard[replica] = time.monotonic()
                    if message.startswith(word):
                        answers[replica] = pickle.loads(message[len(word) :])
                elif child.is_stopped or time.monotonic() - heard[replica] > timeout_s:
                    raise WorkerError(
                        f"{child.title} hangs: it did not answer within {timeout_s:.0f} s"
                    )
        return [answers[replica] for replica in range(self.size)]


class _Replica(LLM):
    """An engine that tells its front end once a second that it is working, and returns refusals as
    values.
    """

    channel: Channel
    told = 0.0

    def advance(self) -> Any:
        now = time.monotonic()
        if now - self.told > 1.0:
            self.told = now
            self.channel.send(b"working")
        return super().advance()

    def refusal(self, requests: list[_Request]) -> tuple[int, int, Exception] | None:
        """The request that a single engine would refuse first, as (0 if it is not valid, 1 if it
        can never run; its number; the error). A single engine makes all sequences before it queues
        one.
        """
        seqs: list[Sequence] = []
        try:
            for number, prompt, params in requests:
                seqs.append(self.make_sequence(str(number), prompt, params, number))
            for seq in seqs:
                number = int(seq.request_id)
                self.scheduler.add(seq)
                self.abort(seq.request_id)
        except (ValueError, TypeError) as error:
            return int(len(seqs) == len(requests)), number, error
        return None

    def outputs(self, requests: list[_Request]) -> list[RequestOutput] | Exception:
        """The outputs, or the error of a call that was refused. Raises an error that ended the
        engine.
        """
        try:
            seqs = [
                self.make_sequence(str(number), prompt, params, number)
                for number, prompt, params in requests
            ]
            return self._run(seqs, use_tqdm=False)
        except (ValueError, TypeError) as error:
            if self._dead is not None:
                raise
            return error


def main(channel: Channel) -> None:
    """Entry point of a replica's process; returns when the channel closes."""
    # from our own front end, over an anonymous socket
    config, num_threads, replica = pickle.loads(channel.receive())
    if replica > 0:
        LOG.setLevel(logging.ERROR)  # the first replica prints what was chosen
    torch.set_num_threads(num_threads)
    arguments = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(EngineConfig)
        if f.name != "model"
    }
    with _Replica(config.model, **arguments) as llm:
        llm.channel = channel
        channel.send(b"ready" + pickle.dumps(llm.resolved_config()))
        requests: list[_Request] = []
        while True:
            command, *given = pickle.loads(channel.receive())
            if command == "check":
                (requests,) = given
                channel.send(b"checked" + pickle.dumps(llm.refusal(requests)))
            elif command == "run":
                channel.send(b"outputs" + pickle.dumps(llm.outputs(requests)))
            else:
                if command != "stats":
                    getattr(llm, command)()
                channel.send(b"counters" + pickle.dumps((llm.stats(), llm.toggles())))


def _length(prompt: Any) -> int:
    """The approximate length of a prompt in tokens."""
    if isinstance(prompt, dict):
        prompt = next(iter(prompt.values()), [])
    return (
        len(prompt) // _CHARACTERS_PER_TOKEN
        if isinstance(prompt, str)
        else len(prompt)
        if isinstance(prompt, list)
        else 0
    )


def _visible_gpus(first: int, count: int) -> dict[str, str]:
    """Environment of a replica that sees `count` of our GPUs, from number `first` on, and no
    others.
    """
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ours.split(",") if ours else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + count])}
