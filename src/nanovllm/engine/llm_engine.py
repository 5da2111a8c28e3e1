"""The engine: requests in, tokens out. `LLM` is its offline interface, the same as vLLM's."""

import dataclasses
import functools
import gc
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from importlib import import_module
from typing import Any, Self, TypeVar

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.host_limits import cpu_cores
from nanovllm.models.config import load_hf_config, read_if_there
from nanovllm.models.loader import resolve_model
from nanovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams

Prompt = str | list[int] | dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])
Params = SamplingParams | SequenceOf[SamplingParams] | None
# What may stand beside a tokenizer.json without changing what it does. model_max_length, which bounds
# nothing here, may be anything.
PLAIN_TOKENIZER = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": None,
}


class EngineDeadError(RuntimeError):
    """The engine was closed, or a step failed: it takes no more requests."""


def one_at_a_time(method: Method) -> Method:
    """Serializes calls from several threads: only one of them runs a step at a time."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class StepLoop:
    """The step protocol with commit lag 0: plan, submit, collect, commit."""

    def __init__(self, scheduler: Scheduler, runner: Any) -> None:
        self.scheduler, self.runner = scheduler, runner

    def step(self) -> tuple[StepPlan | None, list[Sequence]]:
        """Returns the plan and the sequences that got a token."""
        if (plan := self.scheduler.schedule()) is None:
            return None, []
        return plan, self.scheduler.commit(plan, *self.runner.collect(self.runner.submit(plan)))


class LLMEngine:
    """add_request / step / abort, as in vLLM. Use it as a context manager, or call close().

    Until it is closed, Python's garbage collector skips the objects that were alive when the engine
    had started (`gc.freeze`).
    """

    def __init__(self, config: EngineConfig) -> None:
        self._dead: str | None = "it was never started"
        self._turn = threading.RLock()
        self._stats = StepStats()
        begin = time.perf_counter()
        device, config = (
            ("cpu", config) if config.device == "cpu" else _load("gpu.machine", "prepare")(config)
        )
        folder = self._folder = resolve_model(config.model)
        self.model_config = load_hf_config(folder)
        resolved = config.resolve(
            device=device,  # type: ignore[arg-type]
            dtype=self.model_config.dtype if config.dtype == "auto" else config.dtype,
            max_position_embeddings=self.model_config.max_position_embeddings,
        )
        self.tokenizer = (
            None
            if config.skip_tokenizer_init
            else load_tokenizer(config.tokenizer or str(folder), self.model_config.eos_token_ids)
        )
        if resolved.device == "cpu" and torch.get_num_threads() > (cores := cpu_cores()):
            # a container may use fewer cores than torch counts
            torch.set_num_threads(cores)
        on = resolved.optimizations
        make_runner = (
            _load("distributed.workers", "TensorParallelRunner")
            if on.tensor_parallel_size > 1 or resolved.enable_expert_parallel
            else _load("gpu.cuda_graph", "GraphRunner")
            if on.cuda_graphs
            else _load("gpu.runner", "GpuRunner")
            if resolved.device == "cuda"
            else _load("cpu.runner", "CpuRunner")
            if on.overlap or on.kernels == "native"
            else ModelRunner
        )
        self.runner = make_runner(resolved, self.model_config, folder, self._stats)
        self.config = dataclasses.replace(
            resolved,
            num_kv_blocks=self.runner.num_blocks,
            kv_cache_bytes=self.runner.kv_cache_bytes,
        )
        make_blocks = (
            _load("engine.prefix_cache", "CachingBlockManager") if on.prefix_cache else BlockManager
        )
        make_scheduler = (
            Scheduler
            if on.batching == "static"
            else _load("engine.continuous_batching", "ContinuousScheduler")
        )
        self.scheduler = make_scheduler(
            self.config,
            make_blocks(self.runner.num_blocks, resolved.block_size, self._stats),
            self._stats,
        )
        self.loop = (_load("engine.overlap", "OverlappedStepLoop") if on.overlap else StepLoop)(
            self.scheduler, self.runner
        )
        if device == "cuda":
            self.loop = _load("gpu.machine", "started")(self, time.perf_counter() - begin)
        self._step_times: deque[tuple[float, int, int]] = deque(maxlen=2**18)  # some 40 MB
        self._num_requests, self._dead = 0, None
        gc.collect(1)  # a full collection would take longer than a small model's start
        # a collection over all of torch's objects takes longer than many steps
        gc.freeze()
        self._unfreeze = weakref.finalize(self, gc.unfreeze)

    # -- requests ----------------------------------------------------------------------------------

    def make_sequence(
        self, request_id: str, prompt: Prompt, params: SamplingParams, number: int
    ) -> Sequence:
        """Validates a request. Raises ValueError or TypeError that says what was given and what is
        allowed.

        number: how many requests the engine took before this one, refused ones not counted. It
        seeds a request that has no seed.
        """
        text, token_ids = self._tokenize(prompt)
        vocab_size, room = (
            self.model_config.vocab_size,
            self.config.max_model_len - len(token_ids),
        )
        if (
            not token_ids
            or room < 1
            or not all(isinstance(t, int) and 0 <= t < vocab_size for t in token_ids)
        ):
            raise _load("requests.refusals", "bad_prompt")(
                request_id, token_ids, vocab_size, self.config.max_model_len
            )
        if params.max_tokens > room:  # as in vLLM, the answer ends where the context does
            params = dataclasses.replace(params, max_tokens=room)
        # The default seed is the same in every run.
        seed = (
            params.seed
            if params.seed is not None
            else (self.config.seed & 0x7FFFFFFF) << 32 | (number & 0xFFFFFFFF)
        )
        make = (
            Sequence
            if type(params) is SamplingParams
            else _load("requests.sequences", "maker")(self.tokenizer, self.model_config)
        )
        return make(
            request_id,
            list(token_ids),
            params,
            seed,
            RequestMetrics(arrival_time=time.perf_counter()),
            frozenset(params.stop_token_ids).union(
                () if params.ignore_eos else self.model_config.eos_token_ids
            ),
            text,
        )

    @one_at_a_time
    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        """Queues a request; it runs when `step` is called."""
        self._check_alive()
        self.scheduler.add(self.make_sequence(request_id, prompt, params, self._num_requests))
        self._num_requests += 1

    @one_at_a_time
    def abort(self, request_id: str) -> bool:
        """Ends an unfinished request; False if no such request is unfinished."""
        return self.scheduler.abort(request_id) is not None

    def has_unfinished_requests(self) -> bool:
        return bool(self.scheduler.num_unfinished or self.scheduler.in_flight)

    def step(self) -> list[RequestOutput]:
        """Runs one step; returns the state of every request that got a token."""
        return [self.output_of(seq) for seq in self.advance()]

    @one_at_a_time
    def advance(self) -> list[Sequence]:
        """Runs one step; returns the sequences that got a token. A step that fails closes the
        engine and frees its memory; requests/interrupted.py says what Ctrl-C leaves.
        """
        self._check_alive()
        begin = time.perf_counter()
        try:
            plan, advanced = self.loop.step()
        except BaseException as error:
            _load("requests.interrupted", "after")(self, error)
            raise
        now = time.perf_counter()
        if plan is not None:
            self._step_times.append((now - begin, len(plan.token_ids), plan.num_decodes))
        for seq in advanced:
            seq.metrics.first_token_time = seq.metrics.first_token_time or now
            seq.metrics.finished_time = now if seq.finish_reason is not None else None
        return advanced

    def output_of(self, seq: Sequence) -> RequestOutput:
        """The request as vLLM returns it."""
        # the token that ended the request is no part of the text, as in vLLM
        text = (
            self.tokenizer.decode(
                seq.output_token_ids[: -1 if seq.finish_reason == "stop" else None]
            )
            if self.tokenizer is not None
            else ""
        )
        completion = CompletionOutput(
            0, text, seq.output_token_ids, None, None, seq.finish_reason, seq.stop_reason
        )
        if (
            seq.finish_reason is None
            or seq.params.logprobs is not None
            or type(seq) is not Sequence
        ):
            _load("engine.details", "complete")(completion, seq, self.tokenizer)
        return RequestOutput(
            seq.request_id,
            seq.prompt,
            seq.token_ids[: seq.num_prompt_tokens],
            [completion],
            seq.finish_reason is not None,
            seq.metrics,
            seq.num_cached_tokens,
            getattr(seq, "prompt_logprobs", None),
        )

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict) and prompt.keys() in ({"prompt_token_ids"}, {"prompt"}):
            prompt = next(iter(prompt.values()))
        if isinstance(prompt, list):
            return None, prompt
        if not isinstance(prompt, str) or self.tokenizer is None:
            raise _load("requests.refusals", "not_a_prompt")(prompt)
        return prompt, self.tokenizer.encode(prompt).ids

    # -- evidence ----------------------------------------------------------------------------------

    def resolved_config(self) -> dict[str, Any]:
        """The configuration that runs, as JSON-able values for records."""
        return dataclasses.asdict(self.config)

    def stats(self) -> dict[str, int]:
        """Counters by name, since the start or the last reset_stats."""
        return _load("toggles.counters", "flat")(self._stats)  # type: ignore[no-any-return]

    def toggles(self) -> dict[str, dict[str, Any]]:
        """Level, baseline, engaged and opportunity of each optimization."""
        return _load("toggles.counters", "toggle_counters")(self.config.optimizations, self._stats)

    def step_times(self) -> list[tuple[float, int, int]]:
        """(seconds, prefill tokens, decode tokens) of each step since the start or the last
        reset_stats; the last 262,144 steps are kept.
        """
        return list(self._step_times)

    @one_at_a_time
    def reset_stats(self) -> None:
        self._step_times.clear()
        _load("toggles.counters", "reset")(self._stats)

    @one_at_a_time
    def reset_prefix_cache(self) -> None:
        """Forgets every prefix that no running request uses."""
        self.scheduler.blocks.forget_prefixes()

    # -- life --------------------------------------------------------------------------------------

    @one_at_a_time
    def close(self, reason: str = "it was closed") -> None:
        """Ends the engine's processes and frees all its memory. May be called twice."""
        if self._dead is None:
            self._dead, self.loop = reason, None
            self._unfreeze()
            self.runner.close()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"this engine takes no requests: {self._dead}; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LLM(LLMEngine):
    """vLLM's offline interface: `LLM(model, **arguments).generate(prompts, sampling_params)`.
    Threads that share one take turns.
    """

    def __new__(cls, model: str, **kwargs: Any) -> Any:
        """With data_parallel_size above 1, a ReplicatedLLM, which has the same interface."""
        one = (
            config := EngineConfig.from_kwargs(model, **kwargs)
        ).optimizations.data_parallel_size == 1
        return (
            super().__new__(cls)
            if one
            else _load("distributed.data_parallel", "ReplicatedLLM")(config)
        )

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(EngineConfig.from_kwargs(model, **kwargs))

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's recommended parameters, which `generate` uses where none are given, as
        in vLLM.
        """
        return _load("models.sampling_defaults", "default_params")(self._folder)

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer as transformers loads it, as in vLLM. `tokenizer` is the one
        that the engine itself uses.
        """
        return _load("requests.chat", "hf_tokenizer")(self.config)

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **how: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, as vLLM's `chat`. See requests/chat.py for the
        arguments and errors.
        """
        return _load("requests.chat", "chat")(  # type: ignore[no-any-return]
            self, messages, sampling_params, use_tqdm, **how
        )

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
            return _load("requests.several", "generate")(self, batch, use_tqdm)  # type: ignore[no-any-return]
        seqs = [
            self.make_sequence(str(number), prompt, params, number)
            for number, (prompt, params) in enumerate(batch, self._num_requests)
        ]
        return self._run(seqs, use_tqdm)

    def _run(self, seqs: list[Sequence], use_tqdm: bool) -> list[RequestOutput]:
        """Serves the sequences. If one cannot be queued, or a step fails, none of them is left in
        the engine.
        """
        unfinished: set[str] = set()
        try:
            for seq in seqs:
                self.scheduler.add(seq)
                unfinished.add(seq.request_id)
            self._num_requests += len(seqs)
            with tqdm(
                total=len(seqs),
                desc="Processed prompts",
                unit="req",
                disable=not use_tqdm,
                dynamic_ncols=True,
            ) as bar:
                while unfinished:
                    unfinished -= {
                        seq.request_id for seq in self.advance() if seq.finish_reason is not None
                    }
                    bar.update(len(seqs) - len(unfinished) - bar.n)
        finally:
            for request_id in unfinished:
                self.abort(request_id)
        return [self.output_of(seq) for seq in seqs]


def as_batch(
    prompts: Prompt | SequenceOf[Prompt],
    sampling_params: Params,
    default_params: Callable[[], SamplingParams],
) -> list[tuple[Prompt, SamplingParams]]:
    """The requests of one call: one prompt or several, each with its parameters. Raises ValueError
    where the numbers of prompts and parameters differ.
    """
    is_one = isinstance(prompts, (str, dict)) or (
        len(prompts) > 0 and all(isinstance(token, int) for token in prompts)
    )
    batch: list[Any] = [prompts] if is_one else list(prompts)
    given = default_params() if sampling_params is None else sampling_params
    params = list(given) if isinstance(given, SequenceOf) else [given] * len(batch)
    if len(params) != len(batch):
        raise ValueError(
            f"{len(batch)} prompts and {len(params)} sampling_params; give one for all, or one for each"
        )
    return list(zip(batch, params, strict=True))


def _load(module: str, name: str) -> Any:
    """Loads an optional part of the engine by name, only when it is used."""
    return getattr(import_module(f"nanovllm.{module}"), name)


def load_tokenizer(folder: str, eos_token_ids: tuple[int, ...] | None = None) -> Tokenizer:
    """tokenizer.json of a folder or hub id. Raises FileNotFoundError, saying what to do, where
    there is none; ValueError for one that is damaged or that files beside it contradict. Warns where
    eos_token_ids, those of the model, are known and none.
    """
    file = resolve_model(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise _load("models.tokenizer_files", "no_tokenizer")(file, error) from error
    tokenizer.no_truncation()  # both are settings of its last use, not of the model
    tokenizer.no_padding()
    config, names, added = (
        read_if_there(file.with_name(name))
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if (
        eos_token_ids == ()
        or not {**config, **names, **added, "model_max_length": None}.items()
        <= PLAIN_TOKENIZER.items()
    ):
        _load("models.tokenizer_files", "check_tokenizer")(file.parent, tokenizer, eos_token_ids)
    return tokenizer
