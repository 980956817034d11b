"""Prompts to token ids: plain text, chat messages through the checkpoint's template, or ids as they are."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, Final, assert_never

import msgspec

from srt.errors import ErrorCode, ServingError
from srt.messages import ChatPrompt, TextPrompt, TokenPrompt
from srt.tokenizer.template import ChatTemplate
from srt.tokenizer.vocabulary import Vocabulary

SURELY_TOO_LONG_CHARACTERS: Final = 16
"""Characters a token of the context, beyond which a text is first tried in part: an over-long prompt must not
hold up everybody's answers while all of it is tokenized only to be refused."""

RESERVED_VARIABLES: Final = frozenset({"messages", "tools", "documents", "chat_template", "self"})
_PREFIX_SLACK_TOKENS: Final = 64


def pack_ids(token_ids: list[int]) -> bytes:
    """Ids as int32 little-endian bytes, the form in which they travel."""
    return array("i", token_ids).tobytes()


def unpack_ids(token_ids: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    packed = array("i")
    packed.frombytes(token_ids)
    return packed.tolist()


def has_tools(prompt: TextPrompt | TokenPrompt | ChatPrompt) -> bool:
    """Whether a prompt offers tools."""
    match prompt:
        case ChatPrompt(tools=tools):
            return bool(tools)
        case _:
            return False


class Prompter:
    """Turns prompts into ids; the same way for a request and for `/tokenize`."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: ChatTemplate | None,
        context_length: int,
        image_text: str = "",
        *,
        end_thinking: Callable[[str], str] = str,
    ) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self._context_length = context_length
        self._image_text = image_text
        """What stands for an image where a template takes no parts."""
        self._end_thinking = end_thinking
        """Ends the reasoning that a rendered prompt opens."""
        self._last: tuple[TextPrompt | ChatPrompt, bytes] | None = None
        """The last prompt and its ids: several answers to one prompt are as many requests, one after the other."""

    def packed_ids(self, prompt: TextPrompt | TokenPrompt | ChatPrompt) -> bytes:
        """Ids of a prompt, packed. Raises: ServingError if it has none, or surely too many."""
        match prompt:
            case TokenPrompt():
                packed = prompt.token_ids
            case TextPrompt() | ChatPrompt():
                if self._last is None or self._last[0] != prompt:
                    self._last = prompt, pack_ids(self._ids(prompt))
                packed = self._last[1]
            case _:
                assert_never(prompt)
        if not packed:
            raise ServingError(ErrorCode.INVALID_REQUEST, "the prompt has 0 tokens, it needs at least 1", "prompt")
        return packed

    def _ids(self, prompt: TextPrompt | ChatPrompt) -> list[int]:
        match prompt:
            case TextPrompt():
                return self._encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
            case ChatPrompt():
                return self._encode(self._render(prompt), add_special_tokens=False)
            case _:
                assert_never(prompt)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        limit = self._context_length
        if len(text) > SURELY_TOO_LONG_CHARACTERS * limit:
            head = self._vocabulary.encode(text[: SURELY_TOO_LONG_CHARACTERS * limit], add_special_tokens=False)
            if len(head) > limit + _PREFIX_SLACK_TOKENS:
                raise ServingError(
                    ErrorCode.PROMPT_TOO_LONG,
                    f"the prompt has {len(text)} characters and more than {len(head) - _PREFIX_SLACK_TOKENS} tokens, "
                    f"the context length is {limit} tokens",
                    "prompt",
                )
        return self._vocabulary.encode(text, add_special_tokens=add_special_tokens)

    def _render(self, prompt: ChatPrompt) -> str:
        if self._template is None:
            raise ServingError(
                ErrorCode.INVALID_REQUEST,
                "this checkpoint has no chat template; start the server with --chat-template, or send a plain prompt",
                "messages",
            )
        [kwargs] = _decoded(b"[%b]" % (prompt.template_kwargs or b"{}"), "chat_template_kwargs")
        for name in sorted(RESERVED_VARIABLES & kwargs.keys()):
            raise ServingError(
                ErrorCode.INVALID_REQUEST, f"'chat_template_kwargs' must not set {name!r}", "chat_template_kwargs"
            )
        messages = _decoded(prompt.messages, "messages")
        for index, message in enumerate(messages):
            self._normalise(message, index)
        tools = _decoded(prompt.tools, "tools") if prompt.tools else None
        text = self._template.render(messages, tools, kwargs)
        return self._end_thinking(text) if kwargs.get("enable_thinking") is False else text

    def _normalise(self, message: dict[str, Any], index: int) -> None:
        """Bring a message into the one form that templates expect, in place."""
        assert self._template is not None
        if message.get("role") == "developer" and not self._template.knows_developer:
            message["role"] = "system"
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        match message.get("content"):
            case None:
                message["content"] = ""
            case [*parts] if not self._template.takes_parts:
                message["content"] = "\n".join(
                    part["text"] if part["type"] == "text" else self._image_text for part in parts
                )
            case _:
                pass
        for position, call in enumerate(message.get("tool_calls") or ()):
            _open_arguments(call, f"messages[{index}].tool_calls[{position}].function.arguments")


def _decoded(raw: bytes, name: str) -> list[dict[str, Any]]:
    """JSON that the api has checked but for its depth: what it skipped is built here."""
    try:
        return msgspec.json.decode(raw, type=list[dict[str, Any]])
    except RecursionError as error:
        raise ServingError(ErrorCode.INVALID_REQUEST, f"'{name}' is nested too deeply", name) from error


def _open_arguments(call: dict[str, Any], where: str) -> None:
    """Replace a tool call's `arguments`, a JSON text on the wire, by the object that templates iterate over."""
    match call:
        case {"function": {"arguments": str(text)}}:
            pass
        case _:
            return
    try:
        call["function"]["arguments"] = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        message = f"'{where}' is not a JSON object: {text[:80]!r}"
        raise ServingError(ErrorCode.INVALID_REQUEST, message, where) from error
