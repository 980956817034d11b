"""Bodies of the Responses API. Items are decoded one by one, since some of them leave their type out."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from srt.api.bodies import StrictBody


class InputText(msgspec.Struct, frozen=True, tag="input_text"):
    """Text of a client."""

    text: str


class OutputText(msgspec.Struct, frozen=True, tag="output_text"):
    """Text of the model."""

    text: str


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """Text with which a model refused."""

    refusal: str


class InputImage(msgspec.Struct, frozen=True, tag="input_image"):
    """An image: a data URI, or the URL of a listed host."""

    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


class MessageItem(msgspec.Struct, frozen=True, tag="message"):
    """A turn."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal | InputImage]


class CallItem(msgspec.Struct, frozen=True, tag="function_call"):
    """A call that the model made."""

    call_id: str
    name: str
    arguments: str


class CallOutputItem(msgspec.Struct, frozen=True, tag="function_call_output"):
    """What came of a call."""

    call_id: str
    output: str | list[InputText | InputImage]


class Summary(msgspec.Struct, frozen=True):
    """A part of a reasoning's summary."""

    text: str


class ReasoningText(msgspec.Struct, frozen=True):
    """A part of a reasoning."""

    text: str


class ReasoningItem(msgspec.Struct, frozen=True, tag="reasoning"):
    """What the model thought."""

    summary: list[Summary] = []
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem


class FunctionTool(msgspec.Struct, frozen=True):
    """A function. Other types of tools run at OpenAI's."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ReasoningConfig(msgspec.Struct, frozen=True):
    """How much the model thinks. There are no summaries: reasoning is shown as it is."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None


class TextFormat(msgspec.Struct, frozen=True):
    """What the text of the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """How the text of the answer is made."""

    format: TextFormat | None = None
    verbosity: str | None = None


class InputTokensBody(StrictBody, frozen=True):
    """Body of /v1/responses/input_tokens: all that the prompt is made from."""

    input: str | list[dict[str, Any]] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None


class ResponsesBody(InputTokensBody, frozen=True):
    """Body of /v1/responses."""

    include: list[str] | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, str] | None = None
