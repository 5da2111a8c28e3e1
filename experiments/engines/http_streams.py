"""The client side of an HTTP server with OpenAI's completions API: requests that are sent when they are
due and streamed back, all in one thread. Standard library only, so that the same client measures every
server, in any interpreter.

A token's time is when the event that holds it was read. One connection a request, over loopback as a
rule; its set-up counts as latency, as it does for every client that does not keep connections.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Iterator
from typing import Any

from experiments.load.driving import Progress
from experiments.records.types import Served

Address = tuple[str, int]
CONNECT_S = 30.0
_READ_BYTES = 1 << 16


class ServerError(RuntimeError):
    """The server refused a request, broke off an answer, or sent something else than asked for."""


class EventReader:
    """From the bytes of an HTTP/1.1 response to its server-sent events, as they come."""

    def __init__(self) -> None:
        self.status: int | None = None
        self._raw, self._text = b"", b""
        self._is_chunked = False

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events that `data` completes, without the last one, [DONE]. Raises ServerError for an
        event that is an error.
        """
        self._raw += data
        if self.status is None and not self._read_head():
            return
        self._read_body()
        if self.status != 200:
            return
        *events, self._text = self._text.split(b"\n\n")
        for event in events:
            content = event.strip().removeprefix(b"data:").strip()
            if content == b"[DONE]" or not content:
                continue
            found = json.loads(content)
            if "error" in found:
                raise ServerError(f"the server broke off an answer: {found['error']}")
            yield found

    @property
    def body(self) -> str:
        """What was read and belongs to no event: the body of an answer that is no stream."""
        return self._text.decode(errors="replace")

    def _read_head(self) -> bool:
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        if not end:
            return False
        line, *fields = head.split(b"\r\n")
        self.status, self._raw = int(line.split(b" ")[1]), rest
        self._is_chunked = any(
            field.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for field in fields
        )
        return True

    def _read_body(self) -> None:
        if not self._is_chunked:
            self._text, self._raw = self._text + self._raw, b""
        while self._is_chunked:
            size, end, rest = self._raw.partition(b"\r\n")
            if not end:
                return
            length = int(size.split(b";")[0], 16)
            if len(rest) < length + 2:
                return
            self._text += rest[:length]
            self._raw = rest[length + 2 :]
            self._is_chunked = length > 0


class HttpServing:
    """Requests to a server, sent one by one (experiments.engines.Serving, driving.RemoteFace).

    bodies: of POST /v1/completions, each with `stream` and `return_token_ids`.
    """

    def __init__(self, address: Address, bodies: list[dict[str, Any]]) -> None:
        self._address, self._bodies = address, bodies
        self._data = [json.dumps(body).encode() for body in bodies]
        self._tokens: list[list[int]] = [[] for _ in bodies]
        self._reasons: list[str | None] = [None] * len(bodies)
        self._selector = selectors.DefaultSelector()
        self._open: dict[int, tuple[socket.socket, EventReader]] = {}

    def submit(self, index: int) -> None:
        connection = socket.create_connection(self._address, CONNECT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = self._data[index]
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        connection.setblocking(False)
        self._open[index] = connection, EventReader()
        self._selector.register(connection, selectors.EVENT_READ, index)

    def advance(self) -> list[Progress]:
        return self.advance_within(None)

    def advance_within(self, seconds: float | None) -> list[Progress]:
        """Raises ServerError."""
        progress = []
        for key, _ in self._selector.select(seconds):
            index: int = key.data
            before, was_done = len(self._tokens[index]), self._reasons[index] is not None
            self._read(index)
            tokens, reason = len(self._tokens[index]), self._reasons[index]
            if not was_done and (tokens > before or reason is not None):
                progress.append((index, tokens, reason is not None))
        return progress

    def abort(self, index: int) -> None:
        """The server ends a request whose client closes its connection."""
        if index in self._open:
            connection, _ = self._open.pop(index)
            self._selector.unregister(connection)
            connection.close()

    def output(self, index: int) -> list[int]:
        return list(self._tokens[index])

    def set_prompt(self, index: int, prompt_token_ids: list[int]) -> None:
        self._data[index] = json.dumps({**self._bodies[index], "prompt": prompt_token_ids}).encode()

    def served(self) -> Served:
        for index in list(self._open):
            self.abort(index)
        self._selector.close()
        return {
            "outputs": self._tokens,
            "finish_reasons": [reason or "abort" for reason in self._reasons],
            "step_times_s": [],
        }

    def _read(self, index: int) -> None:
        connection, reader = self._open[index]
        data = connection.recv(_READ_BYTES)
        for event in reader.feed(data):
            for choice in event["choices"]:
                if choice.get("token_ids") is None:
                    raise ServerError(
                        f"the server sent no token ids, which return_token_ids asks for: {choice}"
                    )
                self._tokens[index] += choice["token_ids"]
                self._reasons[index] = choice["finish_reason"] or self._reasons[index]
        if data:
            return
        self.abort(index)  # the server has said all
        if reader.status != 200:
            raise ServerError(f"the server answered {reader.status}: {reader.body[:500]}")
        if self._reasons[index] is None:
            raise ServerError(
                f"the server closed the connection of request {index} after {len(self._tokens[index])} tokens"
            )
