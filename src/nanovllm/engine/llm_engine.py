"""The engine: requests in, tokens out. `LLM` is its offline face, with vLLM's interface."""

import dataclasses
import time
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from nanovllm.config import Device, EngineConfig, ResolvedConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import load_hf_config
from nanovllm.models.loader import resolve_model
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams

Prompt = str | list[int] | dict[str, Any]


class EngineDeadError(RuntimeError):
    """The engine was closed, or a step failed: it takes no more requests."""


class StepLoop:
    """The step protocol with commit lag 0: plan, launch, collect, commit."""

    def __init__(self, scheduler: Scheduler, runner: Any) -> None:
        self.scheduler = scheduler
        self.runner = runner

    def step(self) -> tuple[StepPlan | None, list[Sequence]]:
        """Returns the plan and the sequences that got a token."""
        plan = self.scheduler.schedule()
        if plan is None:
            return None, []
        return plan, self.scheduler.commit(plan, *self.runner.collect(self.runner.launch(plan)))


class LLMEngine:
    """add_request / step / abort, as in vLLM. Use it as a context manager, or call close()."""

    def __init__(self, config: EngineConfig) -> None:
        self._dead: str | None = "it was never started"
        self.requested = config
        device: Device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device  # type: ignore[assignment]
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' was asked for and torch sees no GPU; use device='cpu'")
        folder = resolve_model(config.model)
        self.model_config = load_hf_config(folder)
        dtype = self.model_config.dtype if config.dtype == "auto" else config.dtype
        resolved = config.resolve(device=device, dtype=dtype, max_position_embeddings=self.model_config.max_position_embeddings)
        self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config.tokenizer or str(folder))
        self._stats = StepStats()
        self.runner: Any
        if resolved.optimizations.tensor_parallel_size > 1:
            from nanovllm.engine.workers import TensorParallelRunner

            self.runner = TensorParallelRunner(config, resolved, self.model_config, folder, self._stats)
        elif resolved.optimizations.cuda_graphs:
            from nanovllm.engine.cuda_graph import GraphRunner

            self.runner = GraphRunner(config, resolved, self.model_config, folder, TensorParallel(), self._stats)
        else:
            self.runner = ModelRunner(config, resolved, self.model_config, folder, TensorParallel(), self._stats)
        self.config: ResolvedConfig = dataclasses.replace(
            resolved, num_kv_blocks=self.runner.num_blocks, kv_cache_bytes=self.runner.kv_cache_bytes
        )
        blocks = BlockManager(self.config.num_kv_blocks, resolved.block_size)
        if resolved.optimizations.prefix_cache:
            from nanovllm.engine.prefix_cache import CachingBlockManager

            blocks = CachingBlockManager(self.config.num_kv_blocks, resolved.block_size, self._stats)
        self.scheduler = Scheduler(self.config, blocks, self._stats)
        self.loop: Any = StepLoop(self.scheduler, self.runner)
        if resolved.optimizations.overlap:
            from nanovllm.engine.overlap import OverlappedStepLoop

            self.loop = OverlappedStepLoop(self.scheduler, self.runner)
        self._num_requests = 0
        self._step_times: list[tuple[float, int, int]] = []
        self._dead = None

    # -- requests ---------------------------------------------------------------------------------------------------

    def make_sequence(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Sequence:
        """Validates a request. Raises ValueError or TypeError that says what was given and what is allowed."""
        text, token_ids = self._tokenize(prompt)
        vocab_size, limit = self.model_config.vocab_size, self.config.max_model_len
        if not token_ids:
            raise ValueError(f"request {request_id!r} has an empty prompt; give at least one token")
        if bad := [t for t in token_ids if not isinstance(t, int) or not 0 <= t < vocab_size]:
            raise ValueError(f"request {request_id!r} holds token id {bad[0]!r}; allowed are integers from 0 to {vocab_size - 1}")
        if len(token_ids) + params.max_tokens > limit:
            raise ValueError(f"request {request_id!r} has {len(token_ids)} prompt tokens and max_tokens={params.max_tokens}, "
                             f"together more than max_model_len={limit}: shorten it or raise max_model_len")
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.model_config.eos_token_ids))
        seed = params.seed
        if seed is None:  # a key of its own for every request, reproducible in the order of arrival
            seed = ((self.config.seed & 0x7FFFFFFF) << 32) | (self._num_requests & 0xFFFFFFFF)
        self._num_requests += 1
        return Sequence(request_id, list(token_ids), params, seed, time.perf_counter(), stops, text)

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        """Queues a request; it runs when `step` is called."""
        self._check_alive()
        self.scheduler.add(self.make_sequence(request_id, prompt, params))

    def abort(self, request_id: str) -> bool:
        """Ends an unfinished request; False if there is none of that id."""
        return self.scheduler.abort(request_id) is not None

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.num_unfinished > 0 or self.scheduler.num_in_flight > 0

    def step(self) -> list[RequestOutput]:
        """Runs one step; returns the state of every request that got a token in it."""
        return [self.output_of(seq) for seq in self.advance()]

    def advance(self) -> list[Sequence]:
        """Runs one step; returns the sequences that got a token. A failure ends the engine and gives everything back."""
        self._check_alive()
        begin = time.perf_counter()
        try:
            plan, advanced = self.loop.step()
        except BaseException as error:
            self.close(f"a step failed ({type(error).__name__}: {error})")
            raise
        now = time.perf_counter()
        if plan is not None:
            self._step_times.append((now - begin, plan.num_prefill_tokens, plan.num_decodes))
        for seq in advanced:
            if seq.metrics.first_token_time is None:
                seq.metrics.first_token_time = now
            if seq.finish_reason is not None:
                seq.metrics.finished_time = now
        return advanced

    def output_of(self, seq: Sequence) -> RequestOutput:
        """The request as vLLM returns it."""
        token_ids = seq.output_token_ids
        text = self.tokenizer.decode(token_ids) if self.tokenizer is not None else ""
        logprobs = cumulative = None
        if seq.params.logprobs is not None:
            logprobs = [self._logprob_dict(token, entry, seq.params.logprobs)
                        for token, entry in zip(token_ids, seq.logprobs, strict=True)]
            cumulative = sum(entry[0] for entry in seq.logprobs)
        completion = CompletionOutput(0, text, token_ids, cumulative, logprobs, seq.finish_reason, seq.stop_reason)
        return RequestOutput(seq.request_id, seq.prompt, seq.token_ids[: seq.num_prompt_tokens], [completion],
                             seq.finish_reason is not None, seq.metrics, seq.num_cached_tokens)

    def _logprob_dict(self, token: int, entry: Any, count: int) -> dict[int, Logprob]:
        chosen, rank, largest, ids = entry
        found = {i: Logprob(lp, k + 1, self._decode(i)) for k, (lp, i) in enumerate(zip(largest[:count], ids[:count], strict=True))}
        found.setdefault(token, Logprob(chosen, rank, self._decode(token)))
        return found

    def _decode(self, token: int) -> str | None:
        return self.tokenizer.decode([token]) if self.tokenizer is not None else None

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict):
            if set(prompt) == {"prompt_token_ids"}:
                return None, list(prompt["prompt_token_ids"])
            if set(prompt) != {"prompt"}:
                raise TypeError(f"a prompt has the keys {sorted(prompt)}; give {{'prompt_token_ids': [...]}} or {{'prompt': text}}")
            prompt = prompt["prompt"]
        if isinstance(prompt, list):
            return None, prompt
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt is a {type(prompt).__name__}; give a string, a list of token ids or a dict of one")
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: give prompts as {'prompt_token_ids': [...]}")
        return prompt, self.tokenizer.encode(prompt).ids

    # -- evidence ---------------------------------------------------------------------------------------------------

    def resolved_config(self) -> dict[str, Any]:
        return self.config.as_dict()

    def stats(self) -> dict[str, int]:
        """Counters since the start or the last reset_stats, by name."""
        return self._stats.flat()

    def toggles(self) -> dict[str, dict[str, Any]]:
        """Level, engaged and opportunity of each optimization."""
        from nanovllm.engine.toggles import toggle_counters

        return toggle_counters(self.config.optimizations, self._stats)

    def step_times(self) -> list[tuple[float, int, int]]:
        """(seconds, prefill tokens, decode tokens) of each step since the start or the last reset_stats."""
        return list(self._step_times)

    def reset_stats(self) -> None:
        self._step_times.clear()
        self._stats.reset()

    def reset_prefix_cache(self) -> None:
        """Forgets every prefix that no running request holds."""
        self.scheduler.blocks.forget_prefixes()

    # -- life -------------------------------------------------------------------------------------------------------

    def close(self, reason: str = "it was closed") -> None:
        """Ends the processes and gives all memory back. May be called twice."""
        if self._dead is None:
            self._dead = reason
            self.loop = None
            self.runner.close()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"this engine takes no requests: {self._dead}; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class LLM(LLMEngine):
    """vLLM's offline interface: `LLM(model, **arguments).generate(prompts, sampling_params)`."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(EngineConfig.from_kwargs(model, **kwargs))

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Runs every prompt to its end; outputs in the order of the prompts. Nothing runs if one of them is not valid."""
        self._check_alive()
        batch: list[Prompt] = [prompts] if isinstance(prompts, (str, dict)) or _is_token_list(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        given = sampling_params if sampling_params is not None else SamplingParams()
        params = [given] * len(batch) if isinstance(given, SamplingParams) else list(given)
        if len(params) != len(batch):
            raise ValueError(f"{len(batch)} prompts and {len(params)} sampling_params; give one for all, or one for each")
        first = self._num_requests
        seqs = [self.make_sequence(str(first + i), p, s) for i, (p, s) in enumerate(zip(batch, params, strict=True))]
        unfinished = {seq.request_id for seq in seqs}
        try:
            for seq in seqs:
                self.scheduler.add(seq)
            with tqdm(total=len(seqs), desc="Processed prompts", unit="req", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while unfinished:
                    ended = [seq for seq in self.advance() if seq.finish_reason is not None]
                    unfinished.difference_update(seq.request_id for seq in ended)
                    bar.update(len(ended))
        finally:
            for request_id in unfinished:
                self.abort(request_id)
        return [self.output_of(seq) for seq in seqs]


def _is_token_list(prompts: object) -> bool:
    return isinstance(prompts, list) and bool(prompts) and all(isinstance(token, int) for token in prompts)


def load_tokenizer(folder: str) -> Tokenizer:
    """tokenizer.json of a folder or hub id. Raises FileNotFoundError with what to do where there is none."""
    file = resolve_model(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give `tokenizer`, or skip_tokenizer_init=True and prompts as token ids")
    return Tokenizer.from_file(str(file))
