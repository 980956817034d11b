"""Log probabilities as clients read them: OpenAI's chats, its completions, and the native lists."""

from __future__ import annotations

from array import array
from codecs import getincrementaldecoder
from collections.abc import Iterator
from math import isnan
from typing import Any, Final, NamedTuple

from srt.messages import Logprobs

Pairs = list[tuple[float, int, bytes]]
"""Log probability, token id and bytes of tokens; the bytes are empty where nobody wanted them."""

_Utf8Decoder: Final = getincrementaldecoder("utf-8")


class Position(NamedTuple):
    """One position: the token that stands there, the most likely ones, and those that the client listed.

    `value` is None where nothing was computed; then `top` and `listed` are None too.
    """

    value: float | None
    token_id: int
    token: bytes
    top: Pairs | None
    listed: Pairs | None


def positions(logprobs: Logprobs | None, listed_ids: tuple[int, ...] = ()) -> Iterator[Position]:
    """The positions one by one."""
    if logprobs is None:
        return
    ids, values = memoryview(logprobs.token_ids).cast("i").tolist(), _floats(logprobs.values)
    top_ids, top_values = memoryview(logprobs.top_ids).cast("i").tolist(), _floats(logprobs.top_values)
    listed, count, top = _floats(logprobs.listed), len(ids), len(top_ids) // max(1, len(ids))
    texts = logprobs.texts or (b"",) * (count * (1 + top) + len(listed_ids))
    for at, (value, token) in enumerate(zip(values, ids, strict=True)):
        if isnan(value):
            yield Position(None, token, texts[at], None, None)
            continue
        span, names = slice(at * top, (at + 1) * top), slice(count + at * top, count + (at + 1) * top)
        largest = list(zip(top_values[span], top_ids[span], texts[names], strict=True))
        wanted = listed[at * len(listed_ids) : (at + 1) * len(listed_ids)]
        named = list(zip(wanted, listed_ids, texts[count * (1 + top) :], strict=True))
        yield Position(value, token, texts[at], largest, named)


def _floats(packed: bytes) -> list[float]:
    return array("f", packed).tolist()


def text_of(token: bytes) -> str:
    """A token's bytes as text; those that are no whole character show as U+FFFD."""
    return token.decode("utf-8", "replace")


def chat_logprobs(parts: list[Logprobs]) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""

    def entry(value: float | None, token: bytes) -> dict[str, Any]:
        return {"token": text_of(token), "bytes": list(token), "logprob": value}

    content = [
        entry(at.value, at.token) | {"top_logprobs": [entry(value, token) for value, _, token in at.top or ()]}
        for part in parts
        for at in positions(part)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`logprobs` of one choice of a completion, piece by piece: offsets count characters of the whole text."""

    def __init__(self) -> None:
        self._characters = 0
        self._decoder = _Utf8Decoder("replace")

    def render(self, parts: list[Logprobs]) -> dict[str, Any]:
        """The next positions; the token that stands there is among the most likely ones even if it is not."""
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for part in parts:
            for at in positions(part):
                told["tokens"].append(text_of(at.token))
                told["token_logprobs"].append(at.value)
                told["top_logprobs"].append(_by_text(at))
                told["text_offset"].append(self._characters)
                self._characters += len(self._decoder.decode(at.token))
        return told


def _by_text(at: Position) -> dict[str, float] | None:
    if at.value is None:
        return None
    likely: dict[str, float] = {}
    for value, _, token in at.top or ():
        likely.setdefault(text_of(token), value)
    likely.setdefault(text_of(at.token), at.value)
    return likely


def native_lists(parts: list[Logprobs], listed_ids: tuple[int, ...], *, texts: bool) -> dict[str, list[Any]]:
    """Entries of `token_logprobs`, `top_logprobs` and `token_ids_logprobs` in `meta_info`, without their prefixes.

    Each is [log probability, token id, text or null]; where nothing was computed a token has null for the first, and
    the other two lists null for their entry.
    """

    def entry(value: float | None, token_id: int, token: bytes) -> list[Any]:
        return [value, token_id, text_of(token) if texts else None]

    def entries(pairs: Pairs | None) -> list[list[Any]] | None:
        return None if pairs is None else [entry(*pair) for pair in pairs]

    lists: dict[str, list[Any]] = {"token_logprobs": [], "top_logprobs": [], "token_ids_logprobs": []}
    for part in parts:
        for at in positions(part, listed_ids):
            lists["token_logprobs"].append(entry(at.value, at.token_id, at.token))
            if part.top_ids:
                lists["top_logprobs"].append(entries(at.top))
            if listed_ids:
                lists["token_ids_logprobs"].append(entries(at.listed))
    return lists
