"""Every error that this project raises on purpose, and the one table of HTTP statuses.

    SrtError
    ├── ServingError      the caller hears of it: one request ends, nothing else is touched
    ├── StartupError      the server cannot start as asked: one sentence, exit status 1
    └── ProcessLost       a part of the server is gone: the supervisor stops the rest

Anything else that escapes is a bug: the process dies, and the supervisor reports it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class ErrorCode(StrEnum):
    """Machine-readable kind of a `ServingError`; travels in messages and in error bodies."""

    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_FIELD = "unsupported_field"
    PROMPT_TOO_LONG = "context_length_exceeded"
    DOES_NOT_FIT = "exceeds_kv_capacity"
    DUPLICATE_REQUEST_ID = "duplicate_request_id"
    PREVIOUS_NOT_FOUND = "previous_response_not_found"
    UNAUTHORIZED = "invalid_api_key"
    FORBIDDEN = "admin_key_required"
    ORIGIN_REFUSED = "origin_not_allowed"
    NOT_FOUND = "not_found"
    MODEL_NOT_FOUND = "model_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    HEAD_TOO_LARGE = "header_fields_too_large"
    OVERLOADED = "queue_full"
    CONSTRAINT_FAILED = "constraint_failed"
    NOT_READY = "not_ready"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    INTERNAL = "internal_error"


STATUS: Final[dict[ErrorCode, int]] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.UNSUPPORTED_FIELD: 400,
    ErrorCode.PROMPT_TOO_LONG: 400,
    ErrorCode.DOES_NOT_FIT: 400,
    ErrorCode.DUPLICATE_REQUEST_ID: 400,
    ErrorCode.CONSTRAINT_FAILED: 400,
    ErrorCode.PREVIOUS_NOT_FOUND: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.ORIGIN_REFUSED: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.TIMEOUT: 408,
    ErrorCode.BODY_TOO_LARGE: 413,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.HEAD_TOO_LARGE: 431,
    ErrorCode.ABORTED: 499,
    ErrorCode.INTERNAL: 500,
    ErrorCode.NOT_READY: 503,
    ErrorCode.TOO_MANY_CONNECTIONS: 503,
}


class SrtError(Exception):
    """Base of all errors raised on purpose."""


class ServingError(SrtError):
    """One request cannot be served; the message states the rule and the value that broke it."""

    def __init__(self, code: ErrorCode, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.param = param

    @property
    def status(self) -> int:
        """HTTP status of this error."""
        return STATUS[self.code]


class StartupError(SrtError):
    """The server cannot start as asked; the message is one sentence for the person at the terminal."""


class ProcessLost(SrtError):
    """A process of the server is gone or has stopped obeying."""
