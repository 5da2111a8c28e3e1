"""The process of `nanovllm serve`: an engine, uvicorn, and how both end."""

import asyncio
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

from nanovllm.serving.app import Settings, create_app
from nanovllm.serving.async_llm import AsyncLLM
from nanovllm.serving.logs import LOG

LOOPBACK = ("127.0.0.1", "::1", "localhost")


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
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # uvicorn counts whole seconds
        timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
    )
    return Server(config)
