"""One TCP connection: uvicorn's HTTP protocol with bounds on what a peer may send and how long it may take.

Whatever is refused here, below the application, is answered in the form of all other errors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from srt.api.http import error_body
from srt.errors import ErrorCode, ServingError

MAX_HEAD_BYTES: Final = 64 * 1024
"""Request line and header fields together."""

MAX_HEADER_FIELDS: Final = 128

HEAD_S: Final = 20.0
"""How long a head may take from its first byte, and a new connection until its first one."""

BODY_STALL_S: Final = 30.0
"""How long a body may pause."""

FIELD_BYTES: Final = 4
"""What a header field takes beside its name and its value."""


class Settings(uvicorn.Config):
    """uvicorn's settings, and how many connections may be open."""

    max_connections = 1024


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, bounded. `owing_since`: when the peer last gave a sign while its request is incomplete."""

    config: Settings
    connections: set[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.owing_since: float | None = time.monotonic()
        self._sign_at = time.monotonic()
        """When the peer last sent something."""
        self._in_head = False
        self._head_bytes = 0
        self._refusal: ServingError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A peer has connected. Above the limit the longest idle connection makes room; if all work, this one goes."""
        super().connection_made(transport)
        if len(self.connections) <= self.config.max_connections:
            return
        idle = [other for other in self.connections if other is not self and other.is_idle]
        if idle:
            min(idle, key=lambda other: other.idle_since).leave()
            return
        limit = self.config.max_connections
        text = f"{limit} connections are open and none is idle; that is the limit"
        self.refuse(ServingError(ErrorCode.TOO_MANY_CONNECTIONS, text))
        self.leave()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything on this connection."""
        return not self._in_head and (self.cycle is None or self.cycle.response_complete)

    @property
    def idle_since(self) -> float:
        """When the peer last gave a sign."""
        return self._sign_at

    def leave(self) -> None:
        """Close, and count no more from now on."""
        self.connections.discard(self)
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Bytes of the peer."""
        self._sign_at = time.monotonic()
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.refuse(_head_too_large(f"more than {MAX_HEAD_BYTES} bytes"))
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self.owing_since = time.monotonic()

    def on_headers_complete(self) -> None:
        """The head is whole. Raises: ServingError if it is too large; the parser turns that into a 431."""
        size = len(self.url) + sum(len(name) + len(value) + FIELD_BYTES for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADER_FIELDS:
            self._refusal = _head_too_large(f"{size} bytes in {len(self.headers)} fields")
            raise self._refusal
        self._in_head = False
        self.owing_since = time.monotonic()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self.owing_since = time.monotonic()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self.owing_since = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser does not accept, or the callbacks above."""
        self.refuse(self._refusal or ServingError(ErrorCode.INVALID_REQUEST, "this is not valid HTTP/1.1"))

    def refuse(self, error: ServingError) -> None:
        """Answer and close; a response that has begun is cut off instead."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = error_body(error)
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """A protocol that is not spoken here: the request was answered as HTTP/1.1, and nothing can follow it."""
        self.cycle.keep_alive = False

    def drop_if_overdue(self, now: float) -> None:
        """Close if the peer owes the rest of a request for too long; requests before it are not cut off for that."""
        busy = self.cycle is not None and not self.cycle.response_complete
        in_body = busy and self.cycle.more_body and not self.flow.read_paused
        if self.owing_since is None or (busy and not in_body):
            return
        limit_s, part = (BODY_STALL_S, "body") if in_body else (HEAD_S, "head")
        if now - self.owing_since <= limit_s:
            return
        if self._in_head or in_body:
            self.refuse(
                ServingError(ErrorCode.TIMEOUT, f"the rest of the request's {part} did not come in {limit_s} s")
            )
        else:
            self.transport.close()


def drop_overdue(connections: Iterable[Any]) -> None:
    """Close the connections whose peers owe something for too long."""
    now = time.monotonic()
    for connection in list(connections):
        connection.drop_if_overdue(now)


def _head_too_large(size: str) -> ServingError:
    limits = f"the limits are {MAX_HEAD_BYTES} bytes and {MAX_HEADER_FIELDS} fields"
    return ServingError(ErrorCode.HEAD_TOO_LARGE, f"the request's head has {size}, {limits}")
