"""The messages of a chat: checked as far as templates rely on them, images taken out."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from srt.api.bodies import (
    NO_VALUE,
    ChatBody,
    ChatMessage,
    ImageUrl,
    MessagePart,
    TokenizeBody,
    decoded_list,
    invalid,
    shown,
)
from srt.api.tools import Choice
from srt.errors import ErrorCode, ServingError
from srt.messages import ChatPrompt, ImageSource

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
EFFORTS: Final = ("low", "medium", "high")
NO_EFFORT: Final = "none"
"""The model does not think: its reasoning is ended in the prompt."""
IMAGE_PART: Final = {"type": "image"}
"""What templates know an image as."""


def chat_prompt(body: ChatBody | TokenizeBody, choice: Choice) -> tuple[ChatPrompt, tuple[ImageSource, ...]]:
    """Messages, tools and template variables of a chat, checked as far as templates rely on them, and its images."""
    if body.messages == NO_VALUE:
        raise invalid("'messages' is required", "messages")
    messages = decoded_list(body.messages, "messages", list[ChatMessage])
    if not messages:
        raise invalid("'messages' is empty", "messages")
    images: list[ImageSource] = []
    for index, message in enumerate(messages):
        images += _check_message(message, f"messages[{index}]")
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort == NO_EFFORT:
        kwargs["enable_thinking"] = False
    elif body.reasoning_effort is not None:
        if body.reasoning_effort not in EFFORTS:
            efforts = ", ".join((NO_EFFORT, *EFFORTS))
            raise invalid(
                f"'reasoning_effort' is {shown(body.reasoning_effort)}, it must be one of {efforts}",
                "reasoning_effort",
            )
        kwargs["reasoning_effort"] = body.reasoning_effort
    for name, flag in (
        ("add_generation_prompt", body.add_generation_prompt),
        ("continue_final_message", body.continue_final_message),
    ):
        if flag is not None:
            kwargs[name] = flag
    prompt = ChatPrompt(
        messages=_without_images(body.messages) if images else bytes(body.messages),
        tools=bytes(body.tools) if choice.offers else b"",
        template_kwargs=msgspec.json.encode(kwargs) if kwargs else b"",
    )
    return prompt, tuple(images)


def _without_images(raw: msgspec.Raw) -> bytes:
    """The messages with image parts as templates know them: a part that says that here is an image."""
    messages = msgspec.json.decode(raw, type=list[dict[str, Any]])
    for message in messages:
        match message.get("content"):
            case [*parts]:
                message["content"] = [IMAGE_PART if part["type"] == "image_url" else part for part in parts]
            case _:
                pass
    return msgspec.json.encode(messages)


def _check_message(message: ChatMessage, where: str) -> list[ImageSource]:
    """The images of a message that is as it should be."""
    if message.role not in ROLES:
        raise invalid(f"'{where}.role' is {shown(message.role)}, it must be one of {', '.join(ROLES)}", f"{where}.role")
    if message.content is None and message.role != "assistant":
        raise invalid(f"'{where}.content' is required", f"{where}.content")
    match message.content:
        case list() as parts:
            pass
        case _:
            return []
    images: list[ImageSource] = []
    for index, part in enumerate(parts):
        path = f"{where}.content[{index}]"
        if part.type == "image_url":
            images.append(_image_of(part, path))
        elif part.type != "text":
            raise ServingError(
                ErrorCode.UNSUPPORTED_FIELD,
                f"'{path}.type' is {shown(part.type)}: only text and image_url parts are supported",
                f"{path}.type",
            )
        elif part.text is None:
            raise invalid(f"'{path}.text' is required", f"{path}.text")
    return images


def _image_of(part: MessagePart, path: str) -> ImageSource:
    """The image of an image part."""
    match part.image_url:
        case None:
            raise invalid(f"'{path}.image_url' is required", f"{path}.image_url")
        case ImageUrl(url=url, detail=None | "auto" | "low" | "high" as detail):
            return ImageSource(url, detail or "auto")
        case ImageUrl(detail=detail):
            name = f"{path}.image_url.detail"
            raise invalid(f"'{name}' is {shown(detail)}, it must be one of auto, low, high", name)
        case url:
            return ImageSource(url)
