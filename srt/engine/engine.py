"""`srt.Engine`: generate and chat from Python, alone or many at once, whole or as they come."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from srt.configs.arguments import options_config
from srt.configs.server import ServerConfig
from srt.engine.call import Response
from srt.engine.host import Host, encoded

Json = dict[str, Any]


class Engine:
    """A server inside this program. Options are those of `server launch`, with underscores.

        with srt.Engine(model_path="builtin:tiny") as engine:
            engine.generate("Hello", sampling_params={"max_new_tokens": 8})["text"]
            engine.chat([{"role": "user", "content": "Hello"}])["choices"][0]["message"]["content"]

    Fields, answers and errors are those of the HTTP routes, whose code answers them here too. Every method may be
    called from any thread and any event loop; an iterator that is closed early cancels its request. The server ends
    with `shutdown`, with the `with` block, or with this process, however that dies.

    Raises: StartupError if an option is wrong or the server cannot start. Calls raise: ServingError for what the routes
        answer with an error status, ProcessLost if the server has ended.
    """

    def __init__(self, model_path: str = "builtin:tiny", **options: Any) -> None:
        self._host = Host(options_config({"log_level": "warning", **options, "model_path": model_path}))

    @classmethod
    def of(cls, server: ServerConfig) -> Engine:
        """An engine with options that were read already."""
        engine = cls.__new__(cls)
        engine._host = Host(server)
        return engine

    # --- generate -------------------------------------------------------------------------------------------

    @overload
    def generate(
        self, prompt: str | Sequence[str] | None = ..., *, stream: Literal[False] = ..., **fields: Any
    ) -> Any: ...

    @overload
    def generate(
        self, prompt: str | Sequence[str] | None = ..., *, stream: Literal[True], **fields: Any
    ) -> Iterator[Json]: ...

    def generate(self, prompt: str | Sequence[str] | None = None, *, stream: bool = False, **fields: Any) -> Any:
        """`POST /generate` with `text=prompt`: an object, a list for a list of prompts, or an iterator."""
        body = _generate_body(prompt, fields)
        return self.stream("/generate", body) if stream else self.call("/generate", body)

    async def async_generate(self, prompt: str | Sequence[str] | None = None, **fields: Any) -> Any:
        """As `generate`, awaited."""
        return await self.async_call("/generate", _generate_body(prompt, fields))

    def async_generate_stream(self, prompt: str | Sequence[str] | None = None, **fields: Any) -> AsyncIterator[Json]:
        """As `generate` with `stream`, for `async for`."""
        return self.async_stream("/generate", _generate_body(prompt, fields))

    # --- chat -----------------------------------------------------------------------------------------------

    @overload
    def chat(self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = ..., **fields: Any) -> Json: ...

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **fields: Any
    ) -> Iterator[Json]: ...

    def chat(self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **fields: Any) -> Any:
        """`POST /v1/chat/completions`: a completion, or an iterator of chunks."""
        body = {"messages": messages, **fields}
        return self.stream("/v1/chat/completions", body) if stream else self.call("/v1/chat/completions", body)

    async def async_chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Json:
        """As `chat`, awaited."""
        answer: Json = await self.async_call("/v1/chat/completions", {"messages": messages, **fields})
        return answer

    def async_chat_stream(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> AsyncIterator[Json]:
        """As `chat` with `stream`, for `async for`."""
        return self.async_stream("/v1/chat/completions", {"messages": messages, **fields})

    # --- every other route ----------------------------------------------------------------------------------

    def call(self, path: str, body: Any = None) -> Any:
        """Any route that answers with JSON: POST with a body, GET without; the answer decoded."""
        return self.request("GET" if body is None else "POST", path, body).json()

    def request(self, method: str, path: str, body: Any = None) -> Response:
        """Any route: status, headers and body as they are; error statuses are answers too."""
        work = self._host.call(method, path, b"" if body is None else encoded(body))
        return self._host.submit(work).result()

    async def async_call(self, path: str, body: Any = None) -> Any:
        """As `call`, awaited."""
        return (await self.async_request("GET" if body is None else "POST", path, body)).json()

    async def async_request(self, method: str, path: str, body: Any = None) -> Response:
        """As `request`, awaited."""
        work = self._host.call(method, path, b"" if body is None else encoded(body))
        return await asyncio.wrap_future(self._host.submit(work))

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Json]:
        """Any route that streams: its events, decoded. The call starts with the first `next`."""
        waiting: queue.SimpleQueue[Json | BaseException | None] = queue.SimpleQueue()
        task = self._host.submit(_pump(self._host.events(path, _streamed(body)), waiting.put))
        try:
            while (event := waiting.get()) is not None:
                yield _event(event)
        finally:
            task.cancel()

    async def async_stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Json]:
        """As `stream`, for `async for`."""
        waiting: asyncio.Queue[Json | BaseException | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Json | BaseException | None) -> None:
            loop.call_soon_threadsafe(waiting.put_nowait, event)

        task = self._host.submit(_pump(self._host.events(path, _streamed(body)), put))
        try:
            while (event := await waiting.get()) is not None:
                yield _event(event)
        finally:
            task.cancel()

    # --- life -----------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End the server; what runs may finish within `drain_timeout`. Twice does no harm."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown()


def _generate_body(prompt: str | Sequence[str] | None, fields: Mapping[str, Any]) -> Json:
    return dict(fields) if prompt is None else {"text": prompt, **fields}


def _streamed(body: Mapping[str, Any]) -> bytes:
    return encoded({**body, "stream": True})


async def _pump(events: AsyncIterator[Json], put: Any) -> None:
    """Hand events over to another thread, then the error that ended them, if one did, then None."""
    try:
        async for event in events:
            put(event)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        put(error)
    put(None)


def _event(event: Json | BaseException) -> Json:
    match event:
        case BaseException():
            raise event
        case _:
            return event
