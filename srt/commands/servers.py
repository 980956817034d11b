"""A server as commands use it: the one at `--url`, or one inside this program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import aiohttp

from srt.configs.arguments import parse_launch
from srt.engine import Engine
from srt.engine.call import EVENT, NO_MORE, Response, decoded, raise_for
from srt.errors import StartupError


class Server(Protocol):
    """What answers requests."""

    async def post(self, path: str, body: Any) -> Response:
        """One whole answer; error statuses are answers too.

        Raises: aiohttp.ClientError, TimeoutError or ProcessLost if nobody answers.
        """
        ...

    def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Events of a streamed answer. Raises: ServingError, and as `post`."""
        ...


class InsideServer:
    """A server inside this program."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def post(self, path: str, body: Any) -> Response:
        """As the protocol says."""
        return await self._engine.async_request("POST", path, body)

    def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """As the protocol says."""
        return self._engine.async_stream(path, body)


NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=10)


class RemoteServer:
    """A server at a URL."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url.rstrip("/")

    async def post(self, path: str, body: Any) -> Response:
        """As the protocol says."""
        async with self._session.post(self._url + path, json=body) as response:
            return Response(
                response.status, {name.lower(): text for name, text in response.headers.items()}, await response.read()
            )

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """As the protocol says."""
        async with self._session.post(self._url + path, json={**body, "stream": True}) as response:
            if response.status != 200:
                raise_for(response.status, await response.read())
            async for line in response.content:
                data = line.strip().removeprefix(EVENT.strip()).strip() if line.startswith(EVENT) else b""
                if data and data != NO_MORE:
                    yield decoded(data)


@asynccontextmanager
async def reached(url: str | None, api_key: str | None, options: list[str]) -> AsyncIterator[Server]:
    """The server at `url`, or without one a server inside this program with these launch options.

    Raises: StartupError if it cannot start, or if options are given for one that runs already.
    """
    if url is None:
        engine = await asyncio.to_thread(Engine.of, parse_launch(["--log-level=warning", *options]).server)
        try:
            yield InsideServer(engine)
        finally:
            await asyncio.to_thread(engine.shutdown)
        return
    if options:
        raise StartupError(f"{options[0]} is an option of a server to start, but --url names one that runs")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(headers=headers, timeout=NO_TIMEOUT, read_bufsize=2**24) as session:
        yield RemoteServer(session, url if "://" in url else f"http://{url}")
