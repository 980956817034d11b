"""What a task family produces: a chat, what the model should answer, and how to check it."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Message = dict[str, Any]
Split = Literal["train", "eval"]
EFFORTS: Final = ("low", "medium", "high")

# One problem in eight is never shown in training.
HELD_OUT_ONE_IN: Final = 8


@dataclass(frozen=True)
class Call:
    """One tool call: the function's name and its arguments as JSON values."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """An image as a client would send it: decoded pixels (RGB) and the format of its file."""

    pixels: Image
    format: Literal["PNG", "JPEG"] = "PNG"
    encoded: bytes | None = None
    label: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the image file; a PNG is encoded on demand, a JPEG keeps its own bytes."""
        if self.encoded is not None:
            return self.encoded
        buffer = io.BytesIO()
        self.pixels.save(buffer, format=self.format)
        return buffer.getvalue()

    def data_uri(self) -> str:
        """Return the file as a `data:` URI."""
        body = base64.b64encode(self.to_bytes()).decode("ascii")
        return f"data:image/{self.format.lower()};base64,{body}"


@dataclass(frozen=True)
class Example:
    """One prompt with its expected answer.

    `messages` is an OpenAI-style chat; an image part is `{"type": "image", "image": index}` and
    points into `pictures`. `key` names the problem apart from its wrapping, and decides whether
    it belongs to training or to evaluation, unless it is `always_trained`. `thinking` is what
    training shows as reasoning.
    """

    family: str
    key: str
    messages: Sequence[Message]
    thinking: str
    answer: str = ""
    calls: tuple[Call, ...] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    pictures: tuple[Picture, ...] = ()
    effort: str | None = None
    always_trained: bool = False

    def openai_messages(self) -> list[Message]:
        """Return the messages with every image part as an `image_url` that holds its file."""
        return [_with_files(message, self.pictures) for message in self.messages]

    def check(self, message: Mapping[str, Any]) -> bool:
        """Tell whether an assistant message (`content`, `tool_calls`) is the expected answer."""
        calls = message.get("tool_calls") or ()
        if len(calls) != len(self.calls):
            return False
        if self.calls:
            return all(_same_call(want, got) for want, got in zip(self.calls, calls, strict=True))
        return (message.get("content") or "").strip() == self.answer

    def assistant_message(self) -> Message:
        """Return the message a perfect model would give, reasoning included."""
        message: Message = {"role": "assistant", "content": self.answer, "reasoning_content": self.thinking}
        if self.calls:
            message["tool_calls"] = [call_message(call, index) for index, call in enumerate(self.calls)]
        return message


def call_message(call: Call, index: int) -> Message:
    """Return a call in the shape of a chat message's `tool_calls` entry, arguments as a mapping."""
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {"id": f"call_{index}", "type": "function", "function": function}


def belongs(example: Example, split: Split) -> bool:
    """Tell whether a problem is of a split. Depends on nothing but its key."""
    held_out = not example.always_trained and zlib.crc32(example.key.encode()) % HELD_OUT_ONE_IN == 0
    return held_out == (split == "eval")


def _with_files(message: Message, pictures: Sequence[Picture]) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [
        {"type": "image_url", "image_url": {"url": pictures[part["image"]].data_uri()}}
        if part["type"] == "image"
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _same_call(want: Call, got: Mapping[str, Any]) -> bool:
    function = got.get("function", got)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return False
    if not isinstance(arguments, Mapping) or function.get("name") != want.name:
        return False
    same_types = all(type(arguments.get(name)) is type(value) for name, value in want.arguments.items())
    return same_types and dict(arguments) == dict(want.arguments)
