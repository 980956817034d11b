"""One HTTP call and the answers to its prompts, as they come.

A `Ticket` is a call, its `Stream`s are the prompts of it. What arrives while a client is slow is merged into the
stream, so a client that does not read costs one text and one list of ids, and nobody else's time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from srt.api.schema import Request
from srt.errors import ErrorCode, ServingError
from srt.messages import Delta, Finish, Logprobs, SpeculationCounts, Timing


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


@dataclass(slots=True)
class PromptCounts:
    """What a prompt, or all prompts so far, came to."""

    tokens: int = 0
    cached_tokens: int = 0
    images: int = 0
    image_tokens: int = 0

    def add(self, other: PromptCounts) -> None:
        """Count one more prompt."""
        self.tokens += other.tokens
        self.cached_tokens += other.cached_tokens
        self.images += other.images
        self.image_tokens += other.image_tokens


class PendingLogprobs:
    """What has come of log probabilities and is not yet taken: of the prompt, and of the answer."""

    __slots__ = ("output", "prompt")

    def __init__(self) -> None:
        self.prompt: list[Logprobs] = []
        self.output: list[Logprobs] = []


class Stream:
    """One answer to a prompt: what has come and is not yet taken, and totals."""

    __slots__ = (
        "arrived_at", "completion_tokens", "finish", "first_at", "index", "last", "logprobs", "name",
        "pending_ids", "pending_text", "prompt", "retractions", "ticket", "told", "wire_id",
    )  # fmt: skip

    def __init__(self, ticket: Ticket, index: int, name: str, wire_id: str) -> None:
        self.ticket = ticket
        self.index = index
        self.name = name
        self.wire_id = wire_id
        self.pending_text: list[str] = []
        self.pending_ids: list[int] = []
        self.logprobs = PendingLogprobs()
        self.prompt = PromptCounts()
        self.completion_tokens = 0
        self.retractions = 0
        self.finish: Finish | None = None
        self.last: Delta | None = None
        """What came last from the tokenized request: it has its counts, and its times once it has ended."""
        self.told = False
        """The ending has been written to the client."""
        self.first_at = 0.0
        self.arrived_at = 0.0

    @property
    def prompt_index(self) -> int:
        """Which of the call's prompts this answers."""
        return self.index // self.ticket.request.copies

    @property
    def timing(self) -> Timing | None:
        """Stages of an ended request."""
        return None if self.last is None else self.last.timing

    @property
    def speculation(self) -> SpeculationCounts | None:
        """What guessing ahead came to so far."""
        return None if self.last is None else self.last.speculation

    @property
    def thinking(self) -> bool:
        """Whether the prompt left the model within its reasoning."""
        return self.last is not None and self.last.thinking

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of its reasoning so far."""
        return 0 if self.last is None else self.last.reasoning_tokens

    def merge(self, delta: Delta) -> None:
        """Add a delta to what waits to be taken."""
        if delta.text:
            self.pending_text.append(delta.text)
        self.pending_ids += delta.token_ids
        self.completion_tokens += len(delta.token_ids)
        if delta.prompt_tokens:
            self.last = delta
            self.prompt.tokens = delta.prompt_tokens
            self.prompt.cached_tokens = delta.cached_tokens or self.prompt.cached_tokens
            self.prompt.images = delta.images or self.prompt.images
            self.prompt.image_tokens = delta.image_tokens or self.prompt.image_tokens
        if delta.prompt_logprobs is not None:
            self.logprobs.prompt.append(delta.prompt_logprobs)
        if delta.logprobs is not None:
            self.logprobs.output.append(delta.logprobs)
        self.retractions = max(self.retractions, delta.retractions)
        self.finish = delta.finish

    def take_logprobs(self) -> PendingLogprobs:
        """Log probabilities since the last time."""
        taken = self.logprobs
        if taken.prompt or taken.output:
            self.logprobs = PendingLogprobs()
        return taken

    def take(self) -> tuple[str, list[int]]:
        """Text and ids since the last time."""
        text, ids = self.pending_text, self.pending_ids
        self.pending_text, self.pending_ids = [], []
        return text[0] if len(text) == 1 else "".join(text), ids


class Ticket:
    """One call of a client; its handler awaits `news`."""

    def __init__(self, request: Request, name: str) -> None:
        self.request = request
        self.name = name
        self.streams: list[Stream] = []
        self.names: list[str] = []
        """Names under which others find this call or one of its prompts."""
        self.open_streams = 0
        self.started_at = time.perf_counter()
        self.abort_text: str | None = None
        """What the one who aborted wants said about it."""
        self.task: asyncio.Task[Any] | None = None
        self.sending_since: float | None = None
        self.timeout: asyncio.TimerHandle | None = None
        self.timed_out = False
        """`timeout_ms` has passed; what is there goes to the client."""
        self._news: list[Stream] = []
        self._error: ServingError | ClientGone | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def news(self) -> list[Stream]:
        """Streams that have something to take, as soon as there is one; at the end each has come with its finish.

        Raises: ServingError if a prompt failed, ClientGone if nobody waits for the answer.
        """
        if not self._news and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.timed_out and not self.open_streams and not any(stream.completion_tokens for stream in self.streams):
            self.fail(
                ServingError(ErrorCode.TIMEOUT, f"no token came within {self.request.timeout_ms} ms", "timeout_ms")
            )
        if self._error is not None:
            raise self._error
        news, self._news = self._news, []
        return news

    async def whole(self) -> None:
        """Wait for the ends of all streams. Raises: as `news`."""
        while self.open_streams or self._error is not None:
            await self.news()

    def watch(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """End the call when the client closes its connection."""
        self._watcher = asyncio.create_task(self._until_gone(receive))

    async def _until_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.fail(ClientGone())

    def touch(self, stream: Stream) -> None:
        """A stream has news."""
        if stream.finish is not None:
            self.open_streams -= 1
        if stream not in self._news:
            self._news.append(stream)
        self._wake()

    def fail(self, error: ServingError | ClientGone) -> None:
        """The call ends with an error."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def unwatch(self) -> None:
        """The call is over, whatever the client does next."""
        if self._watcher is not None:
            self._watcher.cancel()

    @property
    def client_gone(self) -> bool:
        """Whether the client closed its connection before the end."""
        match self._error:
            case ClientGone():
                return True
            case _:
                return False
