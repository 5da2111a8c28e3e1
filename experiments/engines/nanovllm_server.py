"""The adapter of `nanovllm serve`: the server in a process of its own, driven over HTTP.

It runs with `--dev-endpoints`, by which the launch empties its prefix cache and reads its resolved
configuration, counters and toggles, as the in-process adapter does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from experiments.engines import check_config, nanovllm
from experiments.engines.server_process import HOST, MODEL, ServerAdapter, ServerProcess
from experiments.records.types import Config, Request, Toggles

_START = "import typer; from nanovllm.serving.command import serve; typer.run(serve)"


class Adapter(ServerAdapter):
    """config: as of the adapter nanovllm."""

    name = "nanovllm_server"
    allowed = nanovllm.Adapter.allowed

    def __init__(self, model: str, config: Config) -> None:
        check_config(self.name, config, self.allowed)
        super().__init__(model, config)

    def load(self) -> Config:
        self._server = ServerProcess(self.command(), {})
        self._server.await_health()
        resolved: Config = self._engine()["resolved"]
        return resolved

    def command(self) -> list[str]:
        """How the server is started, without its port."""
        settings = [f"{name}={json.dumps(value)}" for name, value in self._config.items()]
        return [
            *(sys.executable, "-c", _START, self._model, "--host", HOST),
            *("--served-model-name", MODEL, "--dev-endpoints"),
            *(part for setting in settings for part in ("--engine", setting)),
        ]

    def body(self, request: Request) -> dict[str, Any]:
        return {**super().body(request), "seed": request["seed"]}

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self._engine()["counters"]
        return found

    def toggles(self) -> Toggles:
        found: Toggles = self._engine()["toggles"]
        return found

    def _engine(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._server.call("GET", "/engine")[1])
        return found
