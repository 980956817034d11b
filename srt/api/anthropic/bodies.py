"""Bodies of the Messages API. Fields of nested objects that say nothing to a model (`cache_control`) are let pass."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from srt.api.bodies import StrictBody


class Text(msgspec.Struct, frozen=True, tag="text"):
    """Text."""

    text: str


class Base64Source(msgspec.Struct, frozen=True, tag="base64"):
    """An image in the request itself."""

    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class UrlSource(msgspec.Struct, frozen=True, tag="url"):
    """An image elsewhere; only of hosts that the operator lists."""

    url: str


class Image(msgspec.Struct, frozen=True, tag="image"):
    """An image."""

    source: Base64Source | UrlSource


class ToolUse(msgspec.Struct, frozen=True, tag="tool_use"):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any] = {}


class ToolResult(msgspec.Struct, frozen=True, tag="tool_result"):
    """What came of a call."""

    tool_use_id: str
    content: str | list[Text | Image] = ""
    is_error: bool = False


class Thinking(msgspec.Struct, frozen=True, tag="thinking"):
    """What the model thought. The signature is not looked at: reasoning is not encrypted here."""

    thinking: str
    signature: str = ""


class RedactedThinking(msgspec.Struct, frozen=True, tag="redacted_thinking"):
    """What another server's model thought and nobody here can read."""

    data: str


Block = Text | Image | ToolUse | ToolResult | Thinking | RedactedThinking


class Message(msgspec.Struct, frozen=True):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True):
    """A function. Tools that run at Anthropic's have a `type` of their own."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct, frozen=True):
    """Whether the client wants to see what the model thinks."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    """What the text of the answer has to be."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    """How the answer is made."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptBody(StrictBody, frozen=True, kw_only=True):
    """Body of /v1/messages/count_tokens: all that the prompt is made from."""

    model: str
    messages: list[Message]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesBody(PromptBody, frozen=True, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
