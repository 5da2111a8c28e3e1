"""The adapter of nanovllm."""

from __future__ import annotations

import time
from typing import Any

from experiments.engines import check_config, options_of, own_cores
from experiments.load.driving import Progress
from experiments.records.types import Answer, Config, LogprobAnswer, Request, Served, Toggles


class Adapter:
    """config: the constructor arguments of `nanovllm.LLM`, with `optimizations` as a dict that names
    every optimization.
    """

    name = "nanovllm"
    allowed = (
        "dtype",
        "device",
        "seed",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "optimizations",
    )

    def __init__(self, model: str, config: Config) -> None:
        check_config(self.name, config, self.allowed)
        self._model, self._config = model, config

    def load(self) -> Config:
        import torch

        from nanovllm import SamplingParams
        from nanovllm.engine.llm_engine import LLM

        self._sampling_params = SamplingParams
        self._kernels_loaded = count_kernel_loads()
        self._llm: Any = LLM(model=self._model, skip_tokenizer_init=True, **self._config)
        self._watch_the_wait()
        resolved: Config = {
            **self._llm.resolved_config(),
            "torch_threads": torch.get_num_threads(),
            "worker_cores": own_cores(),
        }
        if resolved["optimizations"]["attention_backend"] == "flash_attn":
            from nanovllm.kernels.flash_attn import find_library

            # two packages provide it, in two versions
            resolved["attention_library"] = find_library().describe()
        return resolved

    def _watch_the_wait(self) -> None:
        """Sums up how long the host waits for the device. CPU time cannot show that, because the
        host spins while it waits for a GPU.
        """
        # None if steps have no event: on a CPU, and with tensor parallelism
        self._wait_s: float | None = None
        runner = getattr(self._llm, "runner", None)
        if runner is None:  # replicas wait in their own processes
            return
        collect = runner.collect

        def timed(handle: Any) -> Any:
            if (arrived := getattr(handle, "arrived", None)) is not None:
                begin = time.perf_counter()
                arrived.synchronize()
                self._wait_s = (self._wait_s or 0.0) + time.perf_counter() - begin
            return collect(handle)

        runner.collect = timed

    def kernels_loaded(self) -> int | None:
        """The number of Triton kernels that this process has loaded so far, compiled or from
        Triton's cache. None if the engine computes in other processes.
        """
        runner = getattr(self._llm, "runner", None)
        return self._kernels_loaded[0] if hasattr(runner, "model") else None

    def serve(self, requests: list[Request]) -> Answer:
        prompts, params = self._inputs(requests)
        steps_before, wait_before = len(self._llm.step_times()), self._wait_s
        begin = time.perf_counter()
        results = self._llm.generate(prompts, params, use_tqdm=False)
        end = time.perf_counter()
        moments = [
            (r.metrics.arrival_time, r.metrics.first_token_time, r.metrics.finished_time)
            for r in results
        ]
        return {
            "duration_s": end - begin,
            "outputs": [list(r.outputs[0].token_ids) for r in results],
            "finish_reasons": [r.outputs[0].finish_reason for r in results],
            "request_times_s": [[moment - begin for moment in request] for request in moments],
            "step_times_s": self._llm.step_times()[steps_before:],
            "device_wait_s": None if self._wait_s is None else self._wait_s - (wait_before or 0.0),
        }

    def start(self, requests: list[Request]) -> Serving:
        """Prepares to serve requests as they arrive. Raises ValueError for replicas, which take all
        requests of a call at once.
        """
        if not hasattr(self._llm, "advance"):
            raise ValueError(
                "nanovllm: replicas (data_parallel_size above 1) take no requests over time; use data_parallel_size=1"
            )
        return Serving(self, *self._inputs(requests))

    def logprobs(self, requests: list[Request]) -> LogprobAnswer:
        """Serves requests with log-probabilities (see WithLogprobs). Not timed, because this changes
        the work.
        """
        prompts, params = self._inputs(requests, logprobs=0)
        completions = [
            result.outputs[0] for result in self._llm.generate(prompts, params, use_tqdm=False)
        ]
        return {
            "outputs": [list(c.token_ids) for c in completions],
            "logprobs": [
                [at[token].logprob for token, at in zip(c.token_ids, c.logprobs, strict=True)]
                for c in completions
            ],
        }

    def _inputs(
        self, requests: list[Request], **more: Any
    ) -> tuple[list[dict[str, list[int]]], list[Any]]:
        prompts = [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests]
        return prompts, [
            self._sampling_params(
                max_tokens=request["max_tokens"],
                temperature=request["temperature"],
                top_k=request["top_k"],
                top_p=request["top_p"],
                seed=request["seed"],
                ignore_eos=request["ignore_eos"],
                **options_of(self.name, request),
                **more,
            )
            for request in requests
        ]

    def reset(self) -> None:
        self._llm.reset_prefix_cache()

    def counters(self) -> dict[str, int]:
        return self._llm.stats()  # type: ignore[no-any-return]

    def toggles(self) -> Toggles:
        return self._llm.toggles()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._llm.close()


class Serving:
    """Requests that arrive one by one, through add_request and advance (experiments.engines.Serving)."""

    def __init__(self, adapter: Adapter, prompts: list[Any], params: list[Any]) -> None:
        self._adapter, self._llm = adapter, adapter._llm
        self._prompts, self._params = prompts, params
        self._seqs: dict[int, Any] = {}
        self._steps_before, self._wait_before = len(self._llm.step_times()), adapter._wait_s

    def submit(self, index: int) -> None:
        self._llm.add_request(_id(index), self._prompts[index], self._params[index])

    def advance(self) -> list[Progress]:
        progress = []
        for seq in self._llm.advance():
            index = int(seq.request_id.removeprefix(_id("")))
            self._seqs[index] = seq
            progress.append((index, seq.num_output_tokens, seq.finish_reason is not None))
        return progress

    def abort(self, index: int) -> None:
        self._llm.abort(_id(index))

    def output(self, index: int) -> list[int]:
        return list(self._seqs[index].output_token_ids)

    def set_prompt(self, index: int, prompt_token_ids: list[int]) -> None:
        self._prompts[index] = {"prompt_token_ids": prompt_token_ids}

    def served(self) -> Served:
        found = [self._seqs.get(index) for index in range(len(self._prompts))]
        wait_s, before = self._adapter._wait_s, self._wait_before
        return {
            "outputs": [[] if seq is None else list(seq.output_token_ids) for seq in found],
            "finish_reasons": [
                "abort" if seq is None else seq.finish_reason or "abort" for seq in found
            ],
            "step_times_s": self._llm.step_times()[self._steps_before :],
            "device_wait_s": None if wait_s is None else wait_s - (before or 0.0),
        }


def _id(index: int | str) -> str:
    """The id of a request that arrives over time, unlike those of `generate`."""
    return f"due-{index}"


def count_kernel_loads() -> list[int]:
    """A one-element list that counts the kernels Triton loads in this process. An earlier listener
    is kept.
    """
    count = [0]
    try:
        from triton import knobs
    except ImportError:  # without Triton there are none to load
        return count
    before = knobs.compilation.listener

    def listen(*args: Any, **kwargs: Any) -> None:
        count[0] += 1
        if before is not None:
            before(*args, **kwargs)

    knobs.compilation.listener = listen
    return count
