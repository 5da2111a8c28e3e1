"""What a request must pass before it is read: the API key, and limits of size and time."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from nanovllm.serving.errors import INVALID, ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
DISCARDED = 16
"""A body that is too large is read on and dropped, up to so many times the limit: a client that is
still writing would otherwise see a broken connection instead of the answer.
"""


class Limits:
    """ASGI middleware. api_key: None asks for none; else /v1 wants it as a bearer token."""

    def __init__(
        self, app: App, *, api_key: str | None, max_body_bytes: int, body_timeout_s: float
    ) -> None:
        self.app, self.api_key = app, api_key
        self.max_body_bytes, self.body_timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"].startswith("/v1"):
                self._check_key(headers.get("authorization", ""))
            body = await self._read(receive, headers.get("content-length", ""))
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        if body is None:
            return  # the client went away
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:  # what comes now is the end of the connection
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _check_key(self, given: str) -> None:
        if self.api_key is None:
            return
        scheme, _, key = given.partition(" ")
        is_right = secrets.compare_digest(key.strip().encode(), self.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "no valid API key was given; send the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, receive: Receive, announced: str) -> bytes | None:
        """The whole body; None where the client went away. Raises ApiError."""
        parts: list[bytes] = []
        size = 0
        too_large = announced.isdigit() and int(announced) > self.max_body_bytes
        if too_large and int(announced) > DISCARDED * self.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > self.max_body_bytes
                    if size > DISCARDED * self.max_body_bytes:
                        break
                    if not too_large:
                        parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body was not received within {self.body_timeout_s:g} s",
                code="timeout",
                headers={"Connection": "close"},
            ) from None
        if too_large:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.max_body_bytes} bytes, the limit of this server (--max-body-bytes)",
            INVALID,
            code="body_too_large",
            headers={"Connection": "close"},
        )
