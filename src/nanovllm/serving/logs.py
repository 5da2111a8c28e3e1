"""The log of the server: a line for each request, as text or as JSON."""

import json
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any

from nanovllm.serving.limits import App, Message, Receive, Send

LOG = logging.getLogger("nanovllm.serving")


class JsonLines(logging.Formatter):
    """One JSON object for each record. What a record was given as extra={"fields": {...}} stands
    beside time, level and message.
    """

    converter = time.gmtime  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """The same for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        return " ".join([super().format(record), *(f"{k}={v}" for k, v in fields.items())])


def set_up(as_json: bool) -> None:
    """Writes the logs of the server, of the engine and of uvicorn to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else TextLines())
    for name in ("nanovllm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class RequestLog:
    """Around the whole ASGI application, Starlette's answer to unexpected errors included: one line
    for each request to /v1 when its response has ended. Handlers add fields to
    `scope["state"]["log"]`.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self.app(scope, receive, send)
            return
        begin, status, ended = time.perf_counter(), 0, False
        fields: dict[str, Any] = scope.setdefault("state", {}).setdefault("log", {})

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            # Starlette answers with 500, which is in the log, and raises the error again for the
            # server: uvicorn would log it twice and break off a connection that is in good order
            if not ended:
                raise
        finally:
            client = scope.get("client") or ("", 0)
            LOG.info(
                "request",
                extra={
                    "fields": {
                        "client": f"{client[0]}:{client[1]}",
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "complete": ended,
                        "duration_s": round(time.perf_counter() - begin, 6),
                        **fields,
                    }
                },
            )
