"""HTTP by hand, for what clients' libraries hide: framing, half-sent bodies, connections that vanish."""

from __future__ import annotations

import json
import socket
from typing import Any, Self


class RawConnection:
    """One TCP connection to a local server."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def post(self, path: str, body: Any) -> Self:
        """Send a whole JSON request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + data)
        return self

    def send(self, data: bytes) -> Self:
        """Send bytes as they are."""
        self.socket.sendall(data)
        return self

    def until(self, mark: bytes) -> bytes:
        """Everything received up to and including `mark`."""
        while mark not in self.received:
            data = self.socket.recv(65536)
            assert data, f"closed before {mark!r}: {self.received[-500:]!r}"
            self.received += data
        head, _, self.received = self.received.partition(mark)
        return head + mark

    def response(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a response with a content length."""
        head = self.until(b"\r\n\r\n").decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        length = int(headers["content-length"])
        while len(self.received) < length:
            data = self.socket.recv(65536)
            assert data, "closed within the body"
            self.received += data
        body, self.received = self.received[:length], self.received[length:]
        return int(head[0].split()[1]), headers, body

    def vanish(self) -> None:
        """Reset the connection, as a killed client does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.socket.close()
