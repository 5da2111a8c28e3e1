"""What adapters of servers have in common: the server's process, and requests to it over loopback.

The server runs in a process of its own, started by the launch that measures it and by the same
interpreter; the launch is its client (http_streams.py). Standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import time
from typing import Any

from experiments.engines import options_of
from experiments.engines.http_streams import Address, HttpServing, ServerError
from experiments.load.driving import drive
from experiments.records.types import Answer, Config, Request

HOST, MODEL = "127.0.0.1", "model"
"""MODEL: the name under which the server serves its checkpoint."""
START_S, END_S, LOOK_S = 600.0, 30.0, 0.1
METRICS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_lookup_tokens": "vllm:prefix_cache_queries_total",
    "prefix_hit_tokens": "vllm:prefix_cache_hits_total",
}
"""Counters of records and their names in /metrics, of either server."""


class ServerProcess:
    """A server from its start to its end."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        """command: without the port, which is appended as `--port N`."""
        self.address: Address = (HOST, free_port())
        self._process = subprocess.Popen(
            [*command, "--port", str(self.address[1])],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **variables},
        )

    def await_health(self) -> None:
        """Raises ServerError if the server ends, or does not answer within START_S."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise ServerError(f"the server ended with status {status} before it served")
            try:
                if self.call("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass  # it does not listen yet
            time.sleep(LOOK_S)
        raise ServerError(f"the server did not answer /health within {START_S:g} s")

    def call(self, method: str, path: str) -> tuple[int, str]:
        """(status, body) of a request without a body. Raises OSError."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()

    def end(self) -> None:
        """By SIGTERM, which both servers take as the wish to drain."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ServerAdapter:
    """An Adapter without `name`, `allowed`, `command` and `load`, which depend on the server."""

    name = ""

    def __init__(self, model: str, config: Config) -> None:
        self._model, self._config = model, config
        self._server: Any = None

    def serve(self, requests: list[Request]) -> Answer:
        serving = self.start(requests)
        line = drive(
            serving,
            {"rate": None, "offset_s": [0.0] * len(requests), "after": [None] * len(requests)},
        )
        return {
            "duration_s": line.duration_s,
            "request_times_s": [[0.0, times[0], times[-1]] for times in line.token_s],
            **serving.served(),
        }

    def start(self, requests: list[Request]) -> HttpServing:
        """Prepares to send requests as they become due."""
        return HttpServing(self._server.address, [self.body(request) for request in requests])

    def body(self, request: Request) -> dict[str, Any]:
        """Of POST /v1/completions."""
        return {
            "model": MODEL,
            "prompt": request["prompt_token_ids"],
            "max_tokens": request["max_tokens"],
            "temperature": request["temperature"],
            "top_k": request["top_k"],
            "top_p": request["top_p"],
            "ignore_eos": request["ignore_eos"],
            "stream": True,
            "return_token_ids": True,
            **options_of(self.name, request),
        }

    def reset(self) -> None:
        """Empties the prefix cache. Raises ServerError."""
        status, said = self._server.call("POST", "/reset_prefix_cache")
        if status != 200:
            raise ServerError(f"POST /reset_prefix_cache was answered {status}: {said[:500]}")

    def counters(self) -> dict[str, int]:
        return read_counters(self._server.call("GET", "/metrics")[1])

    def close(self) -> None:
        self._server.end()


def read_counters(metrics: str) -> dict[str, int]:
    """METRICS that stand in a text of Prometheus, over all their labels."""
    found: dict[str, int] = {}
    for name, metric in METRICS.items():
        values = re.findall(rf"(?m)^{re.escape(metric)}(?:\{{.*\}})? (\S+)$", metrics)
        if values:
            found[name] = round(sum(map(float, values)))
    return found


def read_labels(metrics: str, metric: str) -> dict[str, str]:
    """The labels of the first sample of a metric; {} without any."""
    found = re.search(rf"(?m)^{re.escape(metric)}\{{(.*)\}} ", metrics)
    return dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if found else {}


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def as_options(settings: dict[str, Any]) -> list[str]:
    """{"max_num_seqs": 4, "enforce_eager": False} as options of vLLM's command line."""
    options: list[str] = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    return options
