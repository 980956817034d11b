"""One call of the HTTP application from within the same process: same bodies, same answers, no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from srt.api.http import Scope
from srt.errors import ErrorCode, ServingError

EVENT: Final = b"data: "
NO_MORE: Final = b"[DONE]"


class Response(msgspec.Struct, frozen=True):
    """A whole answer. `body` is JSON, but for a few routes such as /metrics."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded. Raises: ServingError if it is an error, ValueError if it is not JSON."""
        raise_for(self.status, self.body)
        if not self.headers.get("content-type", "").startswith("application/json"):
            raise ValueError(f"the answer is {self.headers.get('content-type')}, not JSON; events come by `stream`")
        return json.loads(self.body)  # of the standard library: integers of any size stay what they are


class Call:
    """An exchange with an ASGI application. What it sends waits here, unbounded: a slow reader costs memory only."""

    def __init__(self, method: str, path: str, body: bytes) -> None:
        self.scope: Scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        }
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def begin(self, application: Any) -> None:
        """Run it; needs a running loop."""
        self._task = asyncio.create_task(self._run(application))

    async def _run(self, application: Any) -> None:
        try:
            await application(self.scope, self._receive, self._send)
        finally:
            self._sent.put_nowait(None)

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self._sent.put_nowait(dict(message))

    def leave(self) -> None:
        """Nobody wants the rest: as if a client had closed its connection."""
        self._gone.set()

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What the application sends, until it is done."""
        while (message := await self._sent.get()) is not None:
            yield message

    async def response(self) -> Response:
        """Everything, as one answer."""
        status, headers, parts = 500, {}, []
        async for message in self.messages():
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
            else:
                parts.append(message.get("body", b""))
        return Response(status, headers, b"".join(parts))

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events as they come, decoded. Raises: ServingError if the answer is or ends with an error."""
        status, rest = 200, b""
        async for message in self.messages():
            if message["type"] == "http.response.start":
                status = message["status"]
                continue
            rest += message.get("body", b"")
            if status != 200:
                continue
            *events, rest = rest.split(b"\n\n")
            for event in events:
                data = b"".join(line[len(EVENT) :] for line in event.split(b"\n") if line.startswith(EVENT))
                if data and data != NO_MORE:
                    yield decoded(data)
        raise_for(status, rest)


def decoded(data: bytes) -> dict[str, Any]:
    """The object of one event. Raises: ServingError if it says that the answer broke off."""
    found: dict[str, Any] = json.loads(data)
    if "error" in found and "choices" not in found:
        raise_for(500, data)
    return found


def raise_for(status: int, body: bytes) -> None:
    """Raises: ServingError with what the body says, if the status is that of an error."""
    if status < 400:
        return
    try:
        error = json.loads(body)["error"]
        raise ServingError(_code(error["code"]), error["message"], error.get("param"))
    except (ValueError, KeyError, TypeError):
        raise ServingError(ErrorCode.INTERNAL, f"status {status}: {body[:300].decode(errors='replace')}") from None


def _code(text: object) -> ErrorCode:
    try:
        return ErrorCode(str(text))
    except ValueError:
        return ErrorCode.INTERNAL
