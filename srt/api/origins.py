"""Which web pages may call this server: its own, and those of listed origins.

Browsers send `Origin` with what a page asks of another server. A page that is not allowed is refused before anything is
done for it: hiding the answer, as the browser would, comes too late for a request that costs or changes something.
"""

from __future__ import annotations

from typing import Final

from srt.api.http import Headers
from srt.errors import ErrorCode, ServingError

ALL: Final = "*"
PREFLIGHT_S: Final = 600
"""How long a browser may remember what is allowed."""

EXPOSED: Final = b"x-request-id, retry-after"
"""Headers of responses that a page may read."""


class Origins:
    """The origins of `--allowed-origins`."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._all = ALL in allowed
        self._allowed = {origin.rstrip("/").lower().encode() for origin in allowed}

    def headers_for(self, headers: dict[bytes, bytes]) -> Headers:
        """What the response to a request carries for its browser.

        Raises: ServingError ORIGIN_REFUSED if a page of another origin asks that is not allowed.
        """
        origin = headers.get(b"origin")
        if origin is None or self._is_own(origin, headers.get(b"host", b"")):
            return []
        if not self._all and origin.lower() not in self._allowed:
            shown = origin.decode("latin-1")[:256]
            raise ServingError(
                ErrorCode.ORIGIN_REFUSED,
                f"pages of {shown!r} may not call this server; --allowed-origins lists who may",
            )
        return [
            (b"access-control-allow-origin", b"*" if self._all else origin),
            (b"access-control-expose-headers", EXPOSED),
            (b"vary", b"Origin"),
        ]

    @staticmethod
    def _is_own(origin: bytes, host: bytes) -> bool:
        """Whether the page came from this server. A proxy in front may have ended TLS, so schemes are not compared."""
        return host != b"" and origin.partition(b"://")[2].lower() == host.lower()

    def preflight(self, headers: dict[bytes, bytes]) -> Headers | None:
        """The answer to a browser that asks before it asks; None if this is another kind of OPTIONS.

        Raises: as `headers_for`.
        """
        if b"origin" not in headers or b"access-control-request-method" not in headers:
            return None
        wanted = headers.get(b"access-control-request-headers", b"")
        return [
            *self.headers_for(headers),
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
            (b"access-control-allow-headers", wanted or b"authorization, content-type"),
            (b"access-control-max-age", b"%d" % PREFLIGHT_S),
        ]
