"""Pages for people, from files of the package. They ask no other server for anything."""

from __future__ import annotations

from importlib import resources

from srt.api.http import Exchange, Headers

HTML: Headers = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
     b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
]  # fmt: skip


class Pages:
    """The pages, read once. They hold nothing that a key protects: what they show they ask for, with a key."""

    def __init__(self) -> None:
        self._docs = resources.files("srt.api").joinpath("static/docs.html").read_bytes()

    async def docs(self, exchange: Exchange) -> None:
        """`/docs`: every route and field, from the OpenAPI document."""
        await exchange.respond(self._docs, headers=HTML)
