"""`nanovllm serve` as a process: its logs, SIGTERM, a rank that is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm.serving import command
from tests.serving.test_server import COMPLETIONS, ENDLESS, GREEDY, PROMPT
from tests.support.http_client import begin, call

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

ROOT = Path(__file__).parents[2]
CODE = "import typer; from nanovllm.serving.command import serve; typer.run(serve)"
SMALL = ("device=cpu", "max_model_len=512", "max_num_seqs=4", "kv_cache_memory_bytes=8388608")


class Process:
    """A server and the lines of its log, which are JSON."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, "tiny", "--port", "0", "--json-logs", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[dict[str, Any]] = []
        self._serving = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._serving.wait(120), self.lines
        self.port = next(line["port"] for line in self.lines if "port" in line)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            if text.startswith("{"):
                self.lines.append(json.loads(text))
                if "port" in self.lines[-1]:
                    self._serving.set()
        self._serving.set()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(120)
        self._reader.join(60)
        return status


@contextmanager
def running(*arguments: str) -> Iterator[Process]:
    given = [part for pair in SMALL for part in ("--engine", pair)]
    server = Process(*given, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        server._reader.join(60)
        assert server.process.stderr is not None
        server.process.stderr.close()


def test_sigterm_drains() -> None:
    """A stream that is running gets its end; new connections are refused; the status is 0; each
    request has its line in the log.
    """
    with running() as server:
        stream = begin(
            server.port,
            COMPLETIONS,
            {"prompt": PROMPT, "max_tokens": 400, **GREEDY, "stream": True},
        )
        said = stream.recv(1000)
        assert said.startswith(b"HTTP/1.1 200")
        server.process.send_signal(signal.SIGTERM)
        while part := stream.recv(65536):
            said += part
        stream.close()
        assert b"data: [DONE]" in said
        assert b'"finish_reason": "length"' in said
        assert server.end() == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), 1)
    (request,) = [line for line in server.lines if line["message"] == "request"]
    assert (request["status"], request["complete"], request["completion_tokens"]) == (
        200,
        True,
        400,
    )
    assert {"time", "level", "client", "path", "duration_s", "request_id"} <= request.keys()


def test_what_takes_too_long_to_drain_is_cut_off() -> None:
    with running("--drain-timeout-s", "1") as server:
        streams = [
            begin(server.port, COMPLETIONS, {**ENDLESS, "max_tokens": 480, "stream": True})
            for _ in range(40)
        ]
        assert streams[0].recv(10)
        assert server.end(signal.SIGINT) == 0
        for stream in streams:
            stream.close()


@pytest.mark.slow
def test_a_rank_that_is_killed_is_reported_and_the_server_lives() -> None:
    with running("--engine", "optimizations.tensor_parallel_size=2") as server:
        ranks = psutil.Process(server.process.pid).children()
        assert len(ranks) == 2
        stream = begin(server.port, COMPLETIONS, {**ENDLESS, "max_tokens": 480, "stream": True})
        said = stream.recv(1000)
        ranks[1].kill()
        while part := stream.recv(65536):
            said += part
            if b"[DONE]" in said:
                break
        stream.close()
        assert b"tensor-parallel rank 1 was killed (SIGKILL)" in said
        answer = call(server.port, COMPLETIONS, {"prompt": PROMPT})
        assert (answer.status, answer.error["code"]) == (503, "engine_dead")
        assert call(server.port, "/health").status == 503
        assert server.end() == 0


@pytest.mark.slow
def test_ten_thousand_queued_requests() -> None:
    """As many prompts in 100 requests: all are served, and the server has its blocks back."""
    with running("--max-queue", "10000") as server, ThreadPoolExecutor(100) as pool:
        prompts = [[5 + i % 1000, 6, 7] for i in range(100)]

        def ask(_: int) -> int:
            answer = call(server.port, COMPLETIONS, {"prompt": prompts, "max_tokens": 1, **GREEDY})
            assert answer.status == 200
            return len(answer.json["choices"])

        assert sum(pool.map(ask, range(100))) == 10_000
        text = call(server.port, "/metrics").raw.decode()
        assert 'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.0' in text
        assert server.end() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "max_num_seqs"), "write KEY=VALUE"),
        (("--engine", "max_nums=4"), "max_nums"),
        (("--scheduling-policy", "sjf"), "scheduling_policy='sjf' is not allowed"),
        (
            ("--chat-template", "nosuch.jinja"),
            "--chat-template nosuch.jinja: there is no such file; give the path of a template in Jinja",
        ),
    ],
)
def test_wrong_arguments_are_said_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(command.serve)
    result = CliRunner().invoke(app, ["tiny", *arguments])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert message in result.output


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer
    from typer.testing import CliRunner

    monkeypatch.setattr(command, "EXTRA", ("fastapi", "no_such_package"))
    app = typer.Typer()
    app.command()(command.serve)
    result = CliRunner().invoke(app, ["tiny"])
    assert result.exit_code == 2
    assert "needs no_such_package" in result.output
    assert "nanovllm[serve]" in result.output


def test_engine_arguments_are_json_or_text() -> None:
    given = ["max_num_seqs=64", "dtype=float32", "optimizations.overlap=true", "seed=null"]
    assert command.engine_arguments(given) == {
        "max_num_seqs": 64,
        "dtype": "float32",
        "optimizations": {"overlap": True},
        "seed": None,
    }
