"""Questions to the tokenizer and the scheduler, and their answers."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Final

from srt.errors import ErrorCode, ServingError
from srt.messages import (
    AbortAll,
    CallFailed,
    ChatPrompt,
    Detokenize,
    Detokenized,
    Done,
    FlushCache,
    ImageSource,
    StartProfile,
    StopProfile,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenPrompt,
)
from srt.wire import Outbox

CALL_TIMEOUT_S: Final = 30.0

PROFILE_TIMEOUT_S: Final = 600.0

Question = Tokenize | Detokenize | FlushCache | AbortAll | StartProfile | StopProfile
Reply = Tokenized | Detokenized | Done | CallFailed


class Calls:
    """All questions that wait for an answer."""

    def __init__(self, tokenizer: Outbox) -> None:
        self._tokenizer = tokenizer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}

    def settle(self, reply: Reply) -> None:
        """Hand an answer to who asked; one that comes too late is for nobody."""
        future = self._waiting.pop(reply.call, None)
        if future is not None and not future.done():
            future.set_result(reply)

    async def tokenize(
        self, prompt: TextPrompt | TokenPrompt | ChatPrompt, images: tuple[ImageSource, ...] = ()
    ) -> bytes:
        """Packed ids of a prompt, exactly those that a request with it would have."""
        reply = await self._ask(Tokenize(next(self._numbers), prompt, images))
        match reply:
            case Tokenized(token_ids=packed):
                return packed
            case _:
                raise AssertionError(reply)

    async def detokenize(self, token_ids: bytes, *, skip_special_tokens: bool) -> str:
        """Text of packed ids."""
        reply = await self._ask(Detokenize(next(self._numbers), token_ids, skip_special_tokens))
        match reply:
            case Detokenized(text=text):
                return text
            case _:
                raise AssertionError(reply)

    async def flush_cache(self) -> Done:
        """Drop every cached prefix; not `ok` while requests live."""
        return await self._ask_done(FlushCache(next(self._numbers)))

    async def abort_all(self) -> Done:
        """End every request."""
        return await self._ask_done(AbortAll(next(self._numbers)))

    async def start_profile(self, path: Path, steps: int, **wanted: bool) -> Done:
        """Have every worker record; `path` is the directory of the files and the beginning of their names.

        `wanted`: cpu, device, with_stack, record_shapes as in `StartProfile`.
        """
        question = StartProfile(next(self._numbers), str(path.parent), path.name, steps, **wanted)
        return await self._ask_done(question)

    async def stop_profile(self) -> Done:
        """Have the files written; traces may be large."""
        return await self._ask_done(StopProfile(next(self._numbers)), PROFILE_TIMEOUT_S)

    async def _ask_done(
        self, question: FlushCache | AbortAll | StartProfile | StopProfile, timeout_s: float = CALL_TIMEOUT_S
    ) -> Done:
        reply = await self._ask(question, timeout_s)
        match reply:
            case Done():
                return reply
            case _:
                raise AssertionError(reply)

    async def _ask(self, question: Question, timeout_s: float = CALL_TIMEOUT_S) -> Reply:
        """Raises: ServingError if the call failed or was not answered in time."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[question.call] = future
        self._tokenizer.send(question)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError as error:
            raise ServingError(ErrorCode.TIMEOUT, f"the server did not answer within {timeout_s:.0f} s") from error
        finally:
            self._waiting.pop(question.call, None)
        match reply:
            case CallFailed():
                raise ServingError(reply.code, reply.text, reply.param)
            case _:
                return reply
