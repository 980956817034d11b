"""Messages of the Messages API as those of a chat completion, which the chat template knows."""

from __future__ import annotations

from typing import Any, Final, assert_never

import msgspec

from srt.api.anthropic.bodies import (
    Base64Source,
    Block,
    Image,
    Message,
    PromptBody,
    RedactedThinking,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
    UrlSource,
)
from srt.api.bodies import invalid, shown
from srt.errors import ErrorCode, ServingError

EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
FAILED: Final = "Error: "
"""What stands before the result of a call that failed: chat templates know no mark for it."""


def chat_document(body: PromptBody) -> dict[str, Any]:
    """What a prompt is made from, as fields of a chat completion.

    Raises: ServingError if blocks stand where their role has none, or a tool is not a function.
    """
    messages: list[dict[str, Any]] = []
    match body.system:
        case None | "" | []:
            pass
        case str() as text:
            messages.append({"role": "system", "content": text})
        case list() as blocks:
            messages.append({"role": "system", "content": "\n".join(block.text for block in blocks)})
    for index, message in enumerate(body.messages):
        messages += _turn(message, f"messages[{index}]")
    document: dict[str, Any] = {"messages": messages}
    if body.messages and body.messages[-1].role == "assistant":
        document |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        document["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        document |= _choice(body.tool_choice)
    config = body.output_config
    if config is not None and config.effort is not None:
        document["reasoning_effort"] = EFFORTS[config.effort]
    if config is not None and config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema, "strict": True}
        document["response_format"] = {"type": "json_schema", "json_schema": schema}
    return document


def _turn(message: Message, where: str) -> list[dict[str, Any]]:
    """A turn as messages: results of calls become messages of their own."""
    match message.content:
        case str() as text:
            return [{"role": message.role, "content": text}]
        case list() as blocks:
            match message.role:
                case "assistant":
                    return [_assistant_turn(blocks, where)]
                case "user":
                    return _user_turn(blocks, where)
                case "system":
                    return [_system_turn(blocks, where)]


def _system_turn(blocks: list[Block], where: str) -> dict[str, Any]:
    texts: list[str] = []
    for index, block in enumerate(blocks):
        match block:
            case Text(text=text):
                texts.append(text)
            case _:
                raise _misplaced(f"{where}.content[{index}].type", "system")
    return {"role": "system", "content": "\n".join(texts)}


def _user_turn(blocks: list[Block], where: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        match block:
            case Text() | Image():
                parts.append(_part(block))
            case ToolResult():
                if parts:
                    messages.append({"role": "user", "content": parts})
                    parts = []
                messages.append(_result(block))
            case ToolUse() | Thinking() | RedactedThinking():
                raise _misplaced(f"{where}.content[{index}].type", "user")
            case _:
                assert_never(block)
    if parts or not messages:
        messages.append({"role": "user", "content": parts})
    return messages


def _assistant_turn(blocks: list[Block], where: str) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        match block:
            case Text(text=text):
                texts.append(text)
            case Thinking(thinking=thought):
                thoughts.append(thought)
            case ToolUse():
                function = {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}
                calls.append({"id": block.id, "type": "function", "function": function})
            case RedactedThinking():
                raise ServingError(
                    ErrorCode.UNSUPPORTED_FIELD,
                    f"'{where}.content[{index}]' is redacted thinking, which only the server that wrote it can read",
                    f"{where}.content[{index}]",
                )
            case Image() | ToolResult():
                raise _misplaced(f"{where}.content[{index}].type", "assistant")
            case _:
                assert_never(block)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _misplaced(path: str, role: str) -> ServingError:
    return invalid(f"'{path}': such a block cannot stand in a message of the role {role}", path)


def _result(block: ToolResult) -> dict[str, Any]:
    match block.content:
        case str() as text:
            content: str | list[dict[str, Any]] = FAILED + text if block.is_error else text
        case list() as blocks:
            content = [_part(part) for part in blocks]
            if block.is_error:
                content.insert(0, {"type": "text", "text": FAILED})
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _part(block: Text | Image) -> dict[str, Any]:
    match block:
        case Text(text=text):
            return {"type": "text", "text": text}
        case Image(source=Base64Source(media_type=media_type, data=data)):
            url = f"data:{media_type};base64,{data}"
        case Image(source=UrlSource(url=url)):
            pass
        case _:
            raise AssertionError(block)
    return {"type": "image_url", "image_url": {"url": url}}


def _tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise ServingError(
            ErrorCode.UNSUPPORTED_FIELD,
            f"'{where}' is {shown(tool.type or tool.name)}: only functions with an input_schema are supported",
            where,
        )
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    match choice.type:
        case "auto" | "none":
            fields["tool_choice"] = choice.type
        case "any":
            fields["tool_choice"] = "required"
        case "tool":
            if choice.name is None:
                raise invalid("'tool_choice.name' is required", "tool_choice.name")
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields
