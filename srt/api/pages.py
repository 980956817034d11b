"""Pages for people, from files of the package. They ask no other server for anything."""

from __future__ import annotations

from importlib import resources
from typing import Final

from srt.api.http import Exchange, Headers

KINDS: Final = {"html": b"text/html; charset=utf-8", "css": b"text/css", "js": b"text/javascript"}
CLOSED: Final = b"default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
FILES: Final = {
    "docs.html": CLOSED + b"style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "chat.html": CLOSED + b"style-src 'self'; script-src 'self'; img-src data:",
    "chat.css": CLOSED,
    "chat.js": CLOSED,
}
"""Files by name, and what the browser lets them do."""


class StaticFile:
    """A file of the pages for people. It holds nothing that a key protects: pages ask for that, with a key."""

    def __init__(self, name: str) -> None:
        self._body = resources.files("srt.api").joinpath("static", name).read_bytes()
        self._headers: Headers = [
            (b"content-type", KINDS[name.rpartition(".")[2]]),
            (b"content-security-policy", FILES[name]),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-cache"),
        ]

    async def __call__(self, exchange: Exchange) -> None:
        """A file of the package."""
        await exchange.respond(self._body, headers=self._headers)
