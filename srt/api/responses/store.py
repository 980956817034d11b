"""Responses that are kept, so that a later one can go on from them or a client can ask for them again."""

from __future__ import annotations

from collections import OrderedDict

import msgspec


class Stored(msgspec.Struct, frozen=True):
    """A response and the conversation that led to it, all as JSON. Responses of one conversation share its items."""

    body: bytes
    input: tuple[bytes, ...]
    output: tuple[bytes, ...]

    @property
    def size_bytes(self) -> int:
        """What it is counted with; items that others share are counted for each, so it is never less than it takes."""
        return len(self.body) + sum(map(len, self.input)) + sum(map(len, self.output))


class ResponseStore:
    """At most `limit_bytes` of responses, in memory; those that were not asked for the longest go first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def keep(self, name: str, stored: Stored) -> None:
        """Keep a response, unless it alone is more than the limit."""
        if stored.size_bytes > self._limit_bytes:
            return
        self._stored[name] = stored
        self._size_bytes += stored.size_bytes
        while self._size_bytes > self._limit_bytes:
            _, gone = self._stored.popitem(last=False)
            self._size_bytes -= gone.size_bytes

    def get(self, name: str) -> Stored | None:
        """A response, if it is still kept."""
        stored = self._stored.get(name)
        if stored is not None:
            self._stored.move_to_end(name)
        return stored

    def drop(self, name: str) -> bool:
        """Forget a response; whether it was there."""
        stored = self._stored.pop(name, None)
        if stored is None:
            return False
        self._size_bytes -= stored.size_bytes
        return True
