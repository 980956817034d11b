"""One server seen by a client: what it says of itself, and its answers to chats."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from srt.builtin.tasks import Example, read_completion
from srt.builtin.tasks.transcript import END_OF_THINKING
from srt.errors import StartupError

ANSWER_TOKENS: Final = 1024
"""Room for an answer. The longest right one, 200 numbers counted, has about 830 tokens."""
REQUEST_S: Final = 600.0
"""An answer that takes longer counts as an error."""
FINISHED: Final = ("stop", "tool_calls")
"""Finish reasons of an answer that the model itself ended."""
_SHOWN_CHARACTERS: Final = 300


@dataclass(frozen=True)
class ServerFacts:
    """What `/model_info` says."""

    model: str
    sees_images: bool


@dataclass(frozen=True)
class Reply:
    """An answer, or why there is none.

    `message` has the shape of an API's assistant message with reasoning and tool calls split off; `seconds` is the
    time from sending to the last byte, `steps` the decoding steps if the server counts them.
    """

    seconds: float
    message: Mapping[str, Any] = field(default_factory=dict)
    finish: str = ""
    tokens: int = 0
    steps: int | None = None
    error: str = ""

    def is_right(self, example: Example) -> bool:
        """Whether the answer was ended by the model and is what the example expects."""
        return not self.error and self.finish in FINISHED and example.check(self.message)


class Client:
    """Speaks to the server at `url`; with `stream` it asks for answers as streams and puts them together."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, stream: bool) -> None:
        self._session, self._url, self._stream = session, url.rstrip("/"), stream

    async def facts(self) -> ServerFacts:
        """What the server says of itself. Raises: StartupError if it cannot be asked."""
        try:
            async with self._session.get(f"{self._url}/model_info") as response:
                if response.status != 200:
                    text = (await response.text())[:_SHOWN_CHARACTERS]
                    raise StartupError(f"--url {self._url}: /model_info answers {response.status}: {text}")
                info = await response.json()
                return ServerFacts(info["served_model_name"], bool(info["has_image_understanding"]))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise StartupError(f"--url {self._url}: no server answers there: {_told(error)}") from error
        except (KeyError, TypeError) as error:
            raise StartupError(f"--url {self._url}: /model_info lacks {error}") from error

    async def ask(self, example: Example, model: str) -> Reply:
        """Send an example as a chat, greedy. Errors are part of the reply."""
        body: dict[str, Any] = {
            "model": model,
            "messages": example.openai_messages(),
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
        }
        if example.tools is not None:
            body["tools"] = list(example.tools)
        if example.effort is not None:
            body["reasoning_effort"] = example.effort
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        begun = time.perf_counter()
        try:
            async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    text = (await response.text())[:_SHOWN_CHARACTERS]
                    return Reply(time.perf_counter() - begun, error=f"status {response.status}: {text}")
                answer = await _assembled(response) if self._stream else await response.json()
            return _reply(answer, example, time.perf_counter() - begun)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
            return Reply(time.perf_counter() - begun, error=_told(error))


def _reply(answer: Mapping[str, Any], example: Example, seconds: float) -> Reply:
    choice = answer["choices"][0]
    return Reply(
        seconds=seconds,
        message=split_message(choice["message"], example),
        finish=choice["finish_reason"],
        tokens=answer["usage"]["completion_tokens"],
        steps=_steps(answer),
    )


def split_message(message: Mapping[str, Any], example: Example) -> dict[str, Any]:
    """The message with reasoning and tool calls split off, whichever of the two the server has left in the text."""
    text = message.get("content") or ""
    reasoning = message.get("reasoning_content")
    found = read_completion(text if reasoning is None else END_OF_THINKING + text, example.tools).message()
    if reasoning is not None:
        found["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        found["tool_calls"] = [{"function": _called(call["function"])} for call in message["tool_calls"]]
    return found


def _called(function: Mapping[str, Any]) -> dict[str, str]:
    """What is called and with what; the ids of calls are new in every answer."""
    return {"name": function["name"], "arguments": function["arguments"]}


def _steps(answer: Mapping[str, Any]) -> int | None:
    """Steps that the answer took. Servers that speculate tell those that checked guesses as `spec_verify_ct`; this one
    tells the others too, of which it may have many."""
    for place in (answer["usage"], answer["choices"][0].get("meta_info") or {}):
        steps = place.get("spec_verify_ct")
        if steps:
            return int(steps) + int(place.get("spec_plain_ct", 0))
    return None


async def _assembled(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """A streamed answer in the shape of a whole one. Raises: ValueError if the stream holds an error or breaks off."""
    choice: dict[str, Any] = {"message": {}, "finish_reason": None}
    usage: dict[str, Any] = {}
    async for event in _events(response):
        if "error" in event:
            raise ValueError(str(event["error"])[:_SHOWN_CHARACTERS])
        usage = event.get("usage") or usage
        for part in event.get("choices", ()):
            _extend(choice["message"], part.get("delta") or {})
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            choice["meta_info"] = part.get("meta_info") or choice.get("meta_info")
    if not usage:
        raise ValueError("the stream ended without usage")
    return {"choices": [choice], "usage": usage}


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    done = False
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
        done = done or line.startswith(b"data: [DONE]")
    if not done:
        raise ValueError("the stream broke off")


def _extend(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name in ("content", "reasoning_content"):
        if delta.get(name) is not None:
            message[name] = message.get(name, "") + delta[name]
    calls = message.setdefault("tool_calls", [])
    for part in delta.get("tool_calls") or ():
        if part["index"] == len(calls):
            calls.append({"function": {"name": "", "arguments": ""}})
        for name in ("name", "arguments"):
            calls[part["index"]]["function"][name] += part["function"].get(name) or ""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
