"""What goes wrong with a request, as HTTP: a status and OpenAI's error object."""

import re
from typing import Any

from nanovllm.engine.llm_engine import EngineDeadError
from nanovllm.serving.async_llm import QueueFullError
from nanovllm.serving.responses import error_body

INVALID = "invalid_request_error"
LONGEST_MESSAGE = 1000
"""Characters. Messages show what was given, which may be megabytes, and go into the log as well."""
RETRY_AFTER_S = 1
"""What clients are told when the queue is full. OpenAI's client doubles its own waits from there."""


class ApiError(Exception):
    """An error for the client. status: of HTTP. message: what is beyond LONGEST_MESSAGE is left out of its
    middle.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2 - 3
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body: dict[str, Any] = error_body(message, kind, param, code)


def api_error(error: Exception) -> ApiError | None:
    """The answer to a client for what `AsyncLLM.generate` raises; None for what is a mistake of the
    server.
    """
    message = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, message, "rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, EngineDeadError):
        return ApiError(503, message, "server_error", code="engine_dead")
    if isinstance(error, (ValueError, TypeError)):
        named = re.match(r"(\w+)=", message)
        too_long = "max_model_len" in message or "KV blocks" in message
        code = "context_length_exceeded" if too_long else None
        return ApiError(400, message, param=named[1] if named else None, code=code)
    return None


def timed_out(limit_s: float) -> ApiError:
    return ApiError(
        504,
        f"the request was not finished within {limit_s:g} s, the limit of this server (--request-timeout-s)",
        "server_error",
        code="timeout",
    )
