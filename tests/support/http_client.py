"""A server in a thread of this process, and clients for it that may misbehave. Loopback only."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 120.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(repr=False)
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found

    @property
    def events(self) -> list[Any]:
        """The chunks of a stream, without its [DONE], which must be there."""
        events = self.raw.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-2:]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@contextmanager
def serving(llm: Any, **settings: Any) -> Iterator[int]:
    """The port of a server over an AsyncLLM, which lives on."""
    from nanovllm.serving.app import Settings
    from nanovllm.serving.server import make_server

    server = make_server(llm, Settings(("tiny", "other"), **settings), "127.0.0.1", 0, 5)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)


def call(
    port: int, path: str, body: Any = None, method: str | None = None, **headers: str
) -> Answer:
    """body: JSON, or bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        verb = method or ("GET" if data is None else "POST")
        sent = {"Content-Type": "application/json", **headers}
        connection.request(verb, path, data, sent)
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def begin(port: int, path: str, body: Any) -> socket.socket:
    """Sends a request and returns the connection, from which nothing was read."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection
