"""Reads a raw completion: reasoning, answer and tool calls in Step's syntax."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

END_OF_THINKING: Final = "</think>"
_CALL: Final = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER: Final = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """A completion taken apart. `message()` has the shape an API would answer with."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, Mapping[str, Any]], ...]

    def message(self) -> dict[str, Any]:
        """Return the assistant message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning}
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
                for name, arguments in self.calls
            ]
        return message


def read_completion(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> Answer:
    """Split a completion that starts inside the thinking block.

    Values become integers where the tool's schema says so; everything else stays text.
    """
    head, closed, tail = text.partition(END_OF_THINKING)
    if not closed:
        return Answer(reasoning=text.strip("\n"), content="", calls=())
    calls = tuple(
        (name, {key: _coerce(value, key, _schema(name, tools)) for key, value in _PARAMETER.findall(body)})
        for name, body in _CALL.findall(tail)
    )
    content = _CALL.sub("", tail).strip("\n")
    return Answer(reasoning=head.removesuffix("\n"), content=content, calls=calls)


def _schema(name: str, tools: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    for tool in tools or ():
        function = tool["function"]
        if function["name"] == name:
            properties: Mapping[str, Any] = function["parameters"]["properties"]
            return properties
    return {}


def _coerce(value: str, key: str, properties: Mapping[str, Any]) -> Any:
    if properties.get(key, {}).get("type") == "integer" and re.fullmatch(r"-?[0-9]+", value):
        return int(value)
    return value
