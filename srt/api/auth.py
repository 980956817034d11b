"""Who may call what: two optional keys, every route closed by default."""

from __future__ import annotations

import hmac
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

    def check(self, access: Access, authorization: bytes | None) -> None:
        """Let a request pass, or not. `authorization` is the value of its header, if it has one.

        Raises: ServingError UNAUTHORIZED without a valid key, FORBIDDEN if only the admin key would do.
        """
        if access is Access.OPEN:
            return
        admin = self._matches(self._admin_key, authorization)
        user = self._matches(self._api_key, authorization)
        if admin or (user and (access is Access.KEY or self._admin_key is None)):
            return
        if access is Access.ADMIN and self._admin_key is not None:
            if user or (self._api_key is None and authorization is None):
                raise ServingError(ErrorCode.FORBIDDEN, "this route needs the admin key")
        elif self._api_key is None:
            return
        raise ServingError(
            ErrorCode.UNAUTHORIZED,
            "this server asks for a key: send 'Authorization: Bearer KEY'"
            if authorization is None
            else "the key in the Authorization header is not valid",
        )

    @staticmethod
    def _matches(key: bytes | None, authorization: bytes | None) -> bool:
        if key is None or authorization is None or authorization[: len(BEARER)].lower() != BEARER:
            return False
        return hmac.compare_digest(authorization[len(BEARER) :].strip(), key)


def _encoded(key: str | None) -> bytes | None:
    return None if key is None else key.encode()
