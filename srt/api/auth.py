"""Who may call what: two optional keys, every route closed by default."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from enum import Enum, auto

import msgspec

from srt.errors import ErrorCode, ServingError

BEARER = b"bearer "


class Access(Enum):
    """What a route asks for."""

    OPEN = auto()
    """Nothing: signs of life."""
    KEY = auto()
    """The API key, if the server has one; the admin key is as good."""
    ADMIN = auto()
    """The admin key, if the server has one; else the API key."""


class Secrets(msgspec.Struct, frozen=True):
    """The keys of a server; they are in no plan, no log and no process list."""

    api_key: str | None = None
    admin_api_key: str | None = None

    def __repr__(self) -> str:
        return "Secrets(...)"


class Doorkeeper:
    """Compares keys in constant time."""

    def __init__(self, secrets: Secrets) -> None:
        self._api_key = _encoded(secrets.api_key)
        self._admin_key = _encoded(secrets.admin_api_key)

    def check(self, access: Access, offered: tuple[bytes, ...]) -> None:
        """Let a request pass, or not. `offered`: the keys it came with, from `offered_keys`.

        Raises: ServingError UNAUTHORIZED without a valid key, FORBIDDEN if only the admin key would do.
        """
        if access is Access.OPEN:
            return
        admin = _matches(self._admin_key, offered)
        user = _matches(self._api_key, offered)
        if admin or (user and (access is Access.KEY or self._admin_key is None)):
            return
        if access is Access.ADMIN and self._admin_key is not None:
            if user or (self._api_key is None and not offered):
                raise ServingError(ErrorCode.FORBIDDEN, "this route needs the admin key")
        elif self._api_key is None:
            return
        raise ServingError(
            ErrorCode.UNAUTHORIZED,
            "the key in the header is not valid"
            if offered
            else "this server asks for a key: send 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'",
        )


def offered_keys(headers: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, ...]:
    """Keys in the headers of a request, as OpenAI's clients send them or as Anthropic's do."""
    keys = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization":
            is_bearer = value[: len(BEARER)].lower() == BEARER
            keys.append(value[len(BEARER) :].strip() if is_bearer else b"")
    return tuple(keys)


def _matches(key: bytes | None, offered: tuple[bytes, ...]) -> bool:
    return key is not None and any(hmac.compare_digest(one, key) for one in offered)


def _encoded(key: str | None) -> bytes | None:
    return None if key is None else key.encode()
