"""The page at `/`: static files of this package, open to everybody, for they hold no secret and ask for the key."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from srt.api.http import Exchange

KINDS: Final = {"html": b"text/html; charset=utf-8", "css": b"text/css", "js": b"text/javascript"}
POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The browser itself keeps the page from reaching any other place."""


class File:
    """The endpoint of one file, read once."""

    def __init__(self, name: str) -> None:
        self._body = (files(__name__) / name).read_bytes()
        self._headers = [
            (b"content-type", KINDS[name.rpartition(".")[2]]),
            (b"content-security-policy", POLICY),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-cache"),
        ]

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one call."""
        await exchange.respond(self._body, headers=self._headers)
