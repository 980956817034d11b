"""The checkpoint's chat template: chat messages to the text that the model was trained on.

Rendering follows the conventions that templates are written against (those of transformers): trimmed blocks,
`tojson` that keeps non-ASCII and HTML characters, `raise_exception`, `strftime_now`, loop controls, the
`generation` tag. The environment is sandboxed and immutable: a template comes with a download, it is data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from srt.errors import ErrorCode, ServingError, StartupError
from srt.tokenizer.vocabulary import read_json_object

_MARK: Final = "srt-probe-of-a-text-part"
_CUT: Final = "srt-end-of-final-message "


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; serving renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(text: str) -> NoReturn:
    raise jinja2.TemplateError(text)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def find_template(directory: Path, config: Mapping[str, Any], override: str | None) -> str | None:
    """Source of the chat template: the file `override`, or the checkpoint's own; None if there is none.

    Raises: StartupError if `override` cannot be read.
    """
    beside = directory / "chat_template.jinja"
    if override is not None or beside.is_file():
        file = beside if override is None else Path(override)
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"the chat template {file} cannot be read: {error}") from error
    found = read_json_object(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    match found:
        case str():
            return found
        case [*variants]:
            return next((source for variant in variants if (source := _default_source(variant)) is not None), None)
        case _:
            return None


def _default_source(variant: object) -> str | None:
    """The template of a list's entry, if it is the default one."""
    match variant:
        case {"name": "default", "template": str(source)}:
            return source
        case _:
            return None


def _marked(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A message's content with the mark where it ends; of parts, in a part of its own."""
    match content:
        case str():
            return content + _CUT
        case [*parts, {"type": "text", "text": str(text)} as last]:
            return [*parts, {**last, "text": text + _CUT}]
        case parts:
            return [*parts, {"type": "text", "text": _CUT}]


class ChatTemplate:
    """One compiled template with the checkpoint's special tokens.

    Raises: StartupError if the source is no valid template.
    """

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise StartupError(f"the chat template is not valid: {error}") from error
        self._specials = dict(specials)
        self.knows_developer = "developer" in source
        self.takes_parts = self._takes_parts()

    def _takes_parts(self) -> bool:
        """Whether content may be a list of parts: found out by rendering one, for templates do not say."""
        probe = [{"role": "user", "content": [{"type": "text", "text": _MARK}]}]
        try:
            text = self._template.render(messages=probe, add_generation_prompt=True, **self._specials)
        except Exception:  # as in _render: this template wants content as one string
            return False
        return _MARK in text and "'text'" not in text and '"text"' not in text

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> str:
        """Text of a conversation. `kwargs` reach the template as variables.

        `add_generation_prompt` (default true) opens the assistant's turn; `continue_final_message` leaves the last
        message open instead.
        Raises: ServingError if the template refuses the messages.
        """
        variables = {"add_generation_prompt": True, **self._specials, **kwargs}
        if not variables.pop("continue_final_message", False):
            return self._render(messages, tools, variables)
        if variables["add_generation_prompt"] and "add_generation_prompt" in kwargs:
            raise ServingError(
                ErrorCode.INVALID_REQUEST,
                "'continue_final_message' and 'add_generation_prompt' cannot both be true",
                "continue_final_message",
            )
        final = messages[-1]
        opened = [*messages[:-1], {**final, "content": _marked(final.get("content", ""))}]
        text = self._render(opened, tools, {**variables, "add_generation_prompt": False})
        end = text.rfind(_CUT.rstrip())
        if end < 0:
            raise ServingError(
                ErrorCode.INVALID_REQUEST,
                "'continue_final_message': the chat template does not show the final message",
                "continue_final_message",
            )
        # A template that trims contents would have trimmed the message's own end too.
        return text[:end] if text.startswith(_CUT, end) else text[:end].rstrip()

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        try:
            return self._template.render(messages=messages, tools=tools, documents=None, **variables)
        except Exception as error:  # the template is foreign code: whatever it raises is about these messages
            raise ServingError(
                ErrorCode.INVALID_REQUEST, f"the chat template cannot render these messages: {error}", "messages"
            ) from error
