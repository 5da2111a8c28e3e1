"""The process of `nanovllm serve`: an engine, uvicorn, and how both end."""

import asyncio
import json
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm.serving.app import Settings, create_app
from nanovllm.serving.async_llm import AsyncLLM
from nanovllm.serving.errors import INVALID
from nanovllm.serving.logs import LOG
from nanovllm.serving.responses import error_body

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Connection(H11Protocol):
    """A connection whose client has to send the head of each request in time; uvicorn itself only
    limits the pause between two requests. header_timeout_s: from the connection, or from the first
    byte of a later request, to the end of its headers.
    """

    def __init__(self, *given: Any, header_timeout_s: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._header_timeout_s = header_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and self._header_timer is None:
            self._await_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._have_headers()

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self._header_timeout_s, self._refuse)

    def _have_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self) -> None:
        """Answers 408 and closes."""
        message = f"the headers were not received within {self._header_timeout_s:g} s"
        body = json.dumps(error_body(message, INVALID, code="timeout")).encode()
        head = h11.Response(
            status_code=408,
            reason=b"Request Timeout",
            headers=[
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
            ],
        )
        parts = (head, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, which takes SIGTERM and Ctrl-C as the wish to drain, and then returns: it does not
    raise the signal again, so that the process ends with status 0.
    """

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread hears of signals
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, *given: Any, **named: Any) -> None:
        await super().startup(*given, **named)
        for one in self.servers:
            for socket in one.sockets:
                host, port = socket.getsockname()[:2]
                fields = {"fields": {"host": host, "port": port}}
                LOG.info(
                    "serving on http://%s:%d",
                    f"[{host}]" if ":" in host else host,
                    port,
                    extra=fields,
                )


def serve(
    llm: AsyncLLM, settings: Settings, *, host: str, port: int, drain_timeout_s: float
) -> None:
    """Serves until SIGTERM or Ctrl-C. Then it accepts no more connections, lets unfinished requests
    end for at most drain_timeout_s, cuts off what is left, and ends the engine. port 0: any.
    """
    if host not in LOOPBACK and settings.api_key is None:
        LOG.warning("serving on %s without an API key: anyone who reaches it can use it", host)
    server = make_server(llm, settings, host, port, drain_timeout_s)

    async def work() -> None:
        try:
            await server.serve()
        finally:
            LOG.info("ending the engine")
            await llm.shutdown()

    asyncio.run(work())


def make_server(
    llm: AsyncLLM, settings: Settings, host: str, port: int, drain_timeout_s: float
) -> Server:
    """The server that `serve` runs, which leaves the AsyncLLM to the caller."""
    config = uvicorn.Config(
        create_app(llm, settings),
        host=host,
        port=port,
        http=partial(Connection, header_timeout_s=settings.header_timeout_s),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # uvicorn counts whole seconds
        timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
    )
    return Server(config)
