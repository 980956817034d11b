"""Items of a conversation as the messages of a chat completion, which the chat template knows."""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Iterable
from typing import Any, Final, assert_never

import msgspec

from srt.api.bodies import explained, invalid, shown
from srt.api.responses.bodies import (
    CallItem,
    CallOutputItem,
    FunctionTool,
    InputImage,
    InputText,
    InputTokensBody,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    Refusal,
    TextFormat,
)
from srt.errors import ErrorCode, ServingError

SEALED: Final = "srt:"
"""How `encrypted_content` of this server begins. It is only packed: the client may know what the model thought."""

EFFORTS: Final = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that chat templates call otherwise."""

ID_PREFIXES: Final = {
    "message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_",
}  # fmt: skip


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return prefix + uuid.uuid4().hex


def sealed(reasoning: str) -> str:
    """Reasoning as `encrypted_content`."""
    return SEALED + base64.b64encode(reasoning.encode()).decode()


def input_items(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """What a client sent as items in one form: each with its type and an id, a message with a list of parts."""
    match given:
        case None:
            raise invalid("'input' is required", "input")
        case str() as text:
            given = [{"role": "user", "content": text}]
        case list():
            pass
    items = []
    for item in given:
        kind = item.get("type", "message")
        named = {"id": new_id(ID_PREFIXES.get(str(kind), "item_")), "type": kind} | {
            name: value for name, value in item.items() if value is not None
        }
        match named:
            case {"type": "message", "content": str(text)}:
                part = "output_text" if named.get("role") == "assistant" else "input_text"
                named["content"] = [{"type": part, "text": text}]
            case _:
                pass
        items.append(named)
    return items


def chat_document(body: InputTokensBody, items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a prompt is made from, as fields of a chat completion. `items` is the whole conversation.

    Raises: ServingError if an item, a tool or a format is not supported.
    """
    conversation = Conversation()
    if body.instructions:
        conversation.say({"role": "system", "content": body.instructions})
    for index, item in enumerate(items):
        conversation.add(_decoded(item, f"input[{index}]"), f"input[{index}]")
    document: dict[str, Any] = {"messages": conversation.messages()}
    if body.tools:
        document["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        document["tool_choice"] = _choice(body.tool_choice)
    if body.parallel_tool_calls is not None:
        document["parallel_tool_calls"] = body.parallel_tool_calls
    if body.reasoning is not None and body.reasoning.effort is not None:
        document["reasoning_effort"] = EFFORTS.get(body.reasoning.effort, body.reasoning.effort)
    if body.text is not None and body.text.format is not None:
        document |= _format(body.text.format)
    return document


class Conversation:
    """Messages so far. Reasoning, text and calls of the model that follow each other are one message of it."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None
        """The model's turn, as long as it may go on."""

    def messages(self) -> list[dict[str, Any]]:
        """All of them."""
        self._end_turn()
        return self._messages

    def say(self, message: dict[str, Any]) -> None:
        """A message of somebody else."""
        self._end_turn()
        self._messages.append(message)

    def add(self, item: Item, where: str) -> None:
        """The next item."""
        match item:
            case MessageItem(role="assistant"):
                self._extend("content", _text(item))
            case MessageItem():
                self.say({"role": item.role, "content": _content(item.content)})
            case ReasoningItem():
                self._extend("reasoning_content", _reasoning(item, where))
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                self._open_turn().setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function", "function": function}
                )
            case CallOutputItem():
                self.say({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            case _:
                assert_never(item)

    def _extend(self, name: str, text: str) -> None:
        """A part of the model's turn; one that its turn has already, or that comes behind calls, opens the next."""
        if self._turn is not None and ("tool_calls" in self._turn or self._turn.get(name)):
            self._end_turn()
        self._open_turn()[name] = text

    def _open_turn(self) -> dict[str, Any]:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": ""}
        return self._turn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._messages.append(self._turn)
            self._turn = None


def _decoded(item: dict[str, Any], where: str) -> Item:
    try:
        return msgspec.convert(item, Item)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        path, sentence = explained(error, item, where)
        raise invalid(sentence, path) from error


def _text(item: MessageItem) -> str:
    """What the model said."""
    match item.content:
        case str() as text:
            return text
        case list() as parts:
            pass
    texts = []
    for part in parts:
        match part:
            case InputText(text=text) | OutputText(text=text) | Refusal(refusal=text):
                texts.append(text)
            case InputImage():
                raise invalid("a message of the assistant cannot have an image", "input")
            case _:
                assert_never(part)
    return "".join(texts)


def _content(
    given: str | list[InputText | OutputText | Refusal | InputImage] | list[InputText | InputImage],
) -> str | list[dict[str, Any]]:
    """Text, or parts where there are images."""
    match given:
        case str() as text:
            return text
        case list() as parts:
            pass
    content: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case InputText(text=text) | OutputText(text=text) | Refusal(refusal=text):
                content.append({"type": "text", "text": text})
            case InputImage():
                image = {"url": part.image_url, "detail": part.detail or "auto"}
                content.append({"type": "image_url", "image_url": image})
            case _:
                assert_never(part)
    return content


def _reasoning(item: ReasoningItem, where: str) -> str:
    if item.content:
        return "".join(part.text for part in item.content)
    if item.encrypted_content is None:
        return "\n".join(part.text for part in item.summary)
    try:
        if not item.encrypted_content.startswith(SEALED):
            raise ValueError("not of this server")
        return base64.b64decode(item.encrypted_content.removeprefix(SEALED), validate=True).decode()
    except (ValueError, binascii.Error) as error:
        path = f"{where}.encrypted_content"
        raise invalid(f"'{path}' was not written by this server, so nobody here can read it", path) from error


def _tool(tool: FunctionTool, where: str) -> dict[str, Any]:
    if tool.type != "function":
        raise ServingError(
            ErrorCode.UNSUPPORTED_FIELD,
            f"'{where}.type' is {shown(tool.type)}: only functions are supported",
            f"{where}.type",
        )
    if not tool.name:
        raise invalid(f"'{where}.name' is required", f"{where}.name")
    function: dict[str, Any] = {"name": tool.name}
    for name, value in (("description", tool.description), ("parameters", tool.parameters), ("strict", tool.strict)):
        if value is not None:
            function[name] = value
    return {"type": "function", "function": function}


def _choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    match choice:
        case str():
            return choice
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case _:
            raise ServingError(
                ErrorCode.UNSUPPORTED_FIELD,
                f"'tool_choice' is not supported with the value {shown(choice)}: auto, none, required or a function",
                "tool_choice",
            )


def _format(wanted: TextFormat) -> dict[str, Any]:
    match wanted.type:
        case "text":
            return {}
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            if wanted.schema is None:
                raise invalid("'text.format.schema' is required", "text.format.schema")
            schema: dict[str, Any] = {"name": wanted.name or "answer", "schema": wanted.schema}
            for name, value in (("strict", wanted.strict), ("description", wanted.description)):
                if value is not None:
                    schema[name] = value
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
