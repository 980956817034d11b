"""ZMQ sockets that carry one message union each, over unix sockets in the server's private directory.

Every process binds one PULL inbox, named after it, and connects PUSH outboxes to the inboxes of others.
ZMQ keeps messages of one sender in order; a sender never blocks, because what may be in flight is bounded
where it is admitted (the scheduler's queue limit), not by socket buffers that could close a waiting circle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

M = TypeVar("M")

LINGER_MS = 1_000
"""How long a closing socket tries to hand over what was sent, so that last words arrive."""


def address(directory: Path, name: str) -> str:
    """ZMQ address of the inbox `name` of the server that lives in `directory`."""
    return f"ipc://{directory / name}.sock"


class Inbox(Generic[M]):
    """The receiving end: messages of the union `union`, in the order they came.

    Raises: msgspec.ValidationError on a message outside the union, which only a bug can send.
    """

    def __init__(self, context: zmq.Context[Any], directory: Path, name: str, union: Any) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(address(directory, name))
        self._decode = msgspec.msgpack.Decoder(union).decode

    def wait(self, timeout_ms: int | None) -> bool:
        """Whether a message is there within `timeout_ms` (None: wait for ever)."""
        return bool(self._socket.poll(timeout_ms, zmq.POLLIN))

    def drain(self) -> list[M]:
        """All messages that have arrived, without waiting."""
        messages: list[M] = []
        receive, decode = self._socket.recv, self._decode
        while True:
            try:
                messages.append(decode(receive(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def fileno(self) -> int:
        """ZMQ's edge-triggered descriptor: readable means *look again*, so always `drain` until empty."""
        return int(self._socket.getsockopt(zmq.FD))

    def close(self) -> None:
        """Close at once; what was not received is lost."""
        self._socket.close(0)


class Outbox:
    """The sending end of one edge."""

    def __init__(self, context: zmq.Context[Any], directory: Path, name: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)  # also if it is never closed: a lost peer must not hold us
        self._socket.connect(address(directory, name))
        self._encode = msgspec.msgpack.Encoder().encode

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; never blocks."""
        self._socket.send(self._encode(message), copy=True)

    def close(self) -> None:
        """Hand over what was sent, for at most `LINGER_MS`, then close."""
        self._socket.close(LINGER_MS)
