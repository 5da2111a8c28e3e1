"""An example: how any engine with vLLM's offline API joins the comparisons. One file with one
class.

The engine here is ours, reached as a stranger would: through `LLM` and `SamplingParams` alone. To
add another one, copy this file to experiments/engines/NAME.py, change the import in `load`, add
NAME to ENGINES, and name it in a study:

    cells: {other: {role: reference, engine: NAME, config: {...}}}
    comparisons: {best: {ours: all, theirs: [other], rule: best}}

`load` must return what the engine *resolved* to; the keys dtype, kv_cache_bytes, num_kv_blocks, the
three limits and `levels` are what fairness is judged by. Sampled tokens of a stranger are judged by
their distribution, greedy ones position by position.

`misbehave` serves the tests: tamper (one token is changed), die (the process ends in mid-run),
less_memory (reports half of its KV bytes).
"""

from __future__ import annotations

import os
import time
from typing import Any

from experiments.engines import check_config


class Adapter:
    name = "offline-api"
    allowed = (
        "dtype",
        "device",
        "seed",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "kv_cache_memory_bytes",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "misbehave",
    )

    def __init__(self, model: str, config: dict[str, Any]) -> None:
        check_config(self.name, config, self.allowed)
        self._model, self._config = model, dict(config)
        self._misbehave = self._config.pop("misbehave", None)

    def load(self) -> dict[str, Any]:
        from nanovllm import LLM, SamplingParams

        self._sampling_params = SamplingParams
        self._llm = LLM(self._model, skip_tokenizer_init=True, block_size=16, **self._config)
        resolved = self._llm.resolved_config()
        switches = resolved.pop("optimizations")
        resolved["levels"] = {
            "prefix_cache": "on" if switches["prefix_cache"] else "off",
            "batching": switches["batching"],
        }
        if self._misbehave == "less_memory":
            resolved["kv_cache_bytes"] //= 2
        return resolved

    def serve(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        if self._misbehave == "die" and len(requests) > 2:  # the warm-up has two
            print("the engine dies in mid-run as told", flush=True)
            os._exit(3)
        names = ("max_tokens", "temperature", "top_k", "top_p", "ignore_eos", "seed")
        begin = time.perf_counter()
        results = self._llm.generate(
            [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests],
            [
                self._sampling_params(**{name: request[name] for name in names})
                for request in requests
            ],
            use_tqdm=False,
        )
        duration_s = time.perf_counter() - begin
        outputs = [list(result.outputs[0].token_ids) for result in results]
        if self._misbehave == "tamper":
            outputs[1][0] = (outputs[1][0] + 1) % 2048
        moments = [
            (r.metrics.arrival_time, r.metrics.first_token_time, r.metrics.finished_time)
            for r in results
        ]
        return {
            "duration_s": duration_s,
            "outputs": outputs,
            "finish_reasons": [result.outputs[0].finish_reason for result in results],
            "request_times_s": [[moment - begin for moment in request] for request in moments],
            "step_times_s": [],
        }

    def reset(self) -> None:
        self._llm.reset_prefix_cache()

    def counters(self) -> dict[str, int]:
        return {}

    def toggles(self) -> dict[str, dict[str, Any]]:
        return {}

    def close(self) -> None:
        self._llm.close()
