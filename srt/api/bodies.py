"""Request bodies as types, and the way from bytes to them.

The usual body has honoured fields only and is decoded in one pass. Any other takes the careful way: each field is
looked up in the table of `fields`, what is left is decoded, and what is wrong is told in one sentence a field.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import orjson

from srt.api.fields import FIELDS_OF, NESTED, Body, Handling
from srt.errors import ErrorCode, ServingError

B = TypeVar("B", bound=msgspec.Struct)
V = TypeVar("V")

MAX_PROBLEMS: Final = 10
"""Most faults of one body that are told at once."""

SHOWN_VALUE_CHARACTERS: Final = 80


NO_VALUE: Final = msgspec.Raw(b"null")
"""JSON that is passed on as it came, before it came."""


def _no_value() -> msgspec.Raw:
    return NO_VALUE


class Notice(NamedTuple):
    """One entry of `warnings`; `kind` is its metric label."""

    kind: str
    text: str


class StrictBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all bodies: fields outside the type take the careful way."""


class SharedSampling(StrictBody, frozen=True):
    """Sampling fields that every API spells alike."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_thinking_tokens: int | None = None
    thinking_budget: int | None = None
    thinking_token_budget: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None


class SamplingBody(SharedSampling, frozen=True):
    """`sampling_params` of /generate."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None


class GenerateBody(StrictBody, frozen=True):
    """Body of /generate."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    image_data: str | list[str | list[str] | None] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    return_prompt_token_ids: bool | None = None
    max_thinking_tokens: int | None = None
    require_reasoning: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    speculative: str | None = None
    timeout_ms: int | None = None


class StreamOptions(StrictBody, frozen=True):
    """`stream_options` of the OpenAI API."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIBody(SharedSampling, frozen=True):
    """What completions and chat completions share."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    rid: str | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    speculative: str | None = None
    timeout_ms: int | None = None


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(OpenAIBody, frozen=True):
    """Body of /v1/chat/completions."""

    messages: msgspec.Raw = msgspec.field(default_factory=_no_value)
    tools: msgspec.Raw = msgspec.field(default_factory=_no_value)
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(StrictBody, frozen=True):
    """Body of /tokenize: a prompt, or what makes one out of messages in a chat completion."""

    messages: msgspec.Raw = msgspec.field(default_factory=_no_value)
    tools: msgspec.Raw = msgspec.field(default_factory=_no_value)
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    model: str | None = None
    prompt: str | list[str] | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(StrictBody, frozen=True, kw_only=True):
    """Body of /detokenize."""

    tokens: list[int | list[int]]
    model: str | None = None
    skip_special_tokens: bool | None = None


class FunctionCallBody(StrictBody, frozen=True, kw_only=True):
    """Body of /parse_function_call."""

    text: str
    tools: msgspec.Raw = msgspec.field(default_factory=_no_value)
    tool_call_parser: str | None = None


class SeparateReasoningBody(StrictBody, frozen=True, kw_only=True):
    """Body of /separate_reasoning."""

    text: str
    reasoning_parser: str | None = None


class AbortBody(StrictBody, frozen=True):
    """Body of /abort_request."""

    rid: str | None = None
    abort_all: bool | None = None
    abort_message: str | None = None


class ScoreBody(StrictBody, frozen=True, kw_only=True):
    """Body of /v1/score."""

    query: str | list[int]
    items: str | list[str | list[int]]
    label_token_ids: list[int]
    model: str | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None


class ProfileBody(StrictBody, frozen=True):
    """Body of /start_profile."""

    output_dir: str | None = None
    num_steps: int | None = None
    activities: list[str] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_prefix: str | None = None


class ImageUrl(msgspec.Struct, frozen=True):
    """`image_url` of an image part."""

    url: str
    detail: str | None = None


class MessagePart(msgspec.Struct, frozen=True):
    """One part of a message's content."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class ToolFunction(msgspec.Struct, frozen=True):
    """The function of a call."""

    name: str


class OfferedFunction(msgspec.Struct, frozen=True):
    """The function of a tool that may be called."""

    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """A call in an assistant's message."""

    function: ToolFunction


class ChatMessage(msgspec.Struct, frozen=True):
    """A chat message, as far as it is checked; the template sees it whole."""

    role: str
    content: str | list[MessagePart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class FunctionTool(msgspec.Struct, frozen=True):
    """An entry of `tools`, as far as it is checked; the template sees it whole."""

    function: OfferedFunction
    type: str = "function"


class Parser:
    """Bytes of one kind of body to its type."""

    def __init__(self, kind: Body, struct: type[B]) -> None:
        self._kind = kind
        self._decode = msgspec.json.Decoder(struct).decode

    def parse(self, raw: bytes, *, strict: bool = False) -> tuple[Any, tuple[Notice, ...]]:
        """The body and what was ignored of it; with `strict` nothing may be ignored.

        Raises: ServingError if it is no JSON object of this kind, or asks for what is not supported.
        """
        try:
            return self._decode(raw), ()
        except msgspec.ValidationError:
            pass
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise malformed(raw, error) from error
        document = _json_object(raw)
        notices: list[Notice] = []
        document = _sift(self._kind, document, "", notices)
        body = self._told(document)
        if strict and notices:
            raise ServingError(ErrorCode.INVALID_REQUEST, "; ".join(notice.text for notice in notices) + " (X-Strict)")
        return body, tuple(notices)

    def _told(self, document: dict[str, Any]) -> Any:
        """Decode, or raise with one sentence for each wrong field."""
        problems: list[tuple[str, str]] = []
        body = None
        while body is None:
            try:
                body = self._decode(msgspec.json.encode(document))
            except msgspec.ValidationError as error:
                path, sentence = explained(error, document)
                problems.append((path, sentence))
                field = re.split(r"[.\[]", path, maxsplit=1)[0]
                if field not in document or len(problems) == MAX_PROBLEMS:
                    break
                del document[field]
        if problems:
            told = [sentence for path, sentence in problems if len(problems) == 1 or sentence != _missing(path)]
            raise ServingError(ErrorCode.INVALID_REQUEST, "; ".join(told), problems[0][0] or None)
        return body


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(raw, error) from error
    match document:
        case dict():
            return document
        case _:
            raise ServingError(ErrorCode.INVALID_REQUEST, f"the body must be a JSON object, got {shown(document)}")


def _sift(kind: Body, document: dict[str, Any], path: str, notices: list[Notice]) -> dict[str, Any]:
    """The honoured fields of a body. Raises: ServingError at the first field that is not supported."""
    kept: dict[str, Any] = {}
    for name, value in document.items():
        field = FIELDS_OF[kind].get(name)
        if value is None:
            continue
        if field is None:
            notices.append(Notice("unknown_field", f"unknown field '{path}{name}' was ignored"))
        elif field.handling is Handling.HONOURED:
            kept[name] = _sift_nested(NESTED[name], value, path + name, notices) if name in NESTED else value
        elif field.is_neutral(value):
            continue
        elif field.handling is Handling.NOTED:
            notices.append(Notice("ignored_field", f"field '{path}{name}' has no effect: {field.note}"))
        else:
            raise ServingError(
                ErrorCode.UNSUPPORTED_FIELD,
                f"'{path}{name}' is not supported with the value {shown(value)}: {field.note}",
                path + name,
            )
    return kept


def _sift_nested(kind: Body, value: Any, path: str, notices: list[Notice]) -> Any:
    match value:
        case dict():
            return _sift(kind, value, path + ".", notices)
        case list():
            return [_sift_nested(kind, entry, f"{path}[{index}]", notices) for index, entry in enumerate(value)]
        case _:
            return value


def invalid(text: str, param: str | None) -> ServingError:
    """The error of a field that breaks a rule."""
    return ServingError(ErrorCode.INVALID_REQUEST, text, param)


def malformed(raw: bytes, error: Exception) -> ServingError:
    """Why these bytes are no JSON, with the place where `orjson` finds one."""
    match error:
        case RecursionError():
            reason = "it is nested too deeply"
        case _:
            reason = "a number is out of range"
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError as found:
        reason = str(found)
    return ServingError(ErrorCode.INVALID_REQUEST, f"the body is not valid JSON: {reason}")


def decoded_list(raw: msgspec.Raw, name: str, kind: type[list[V]]) -> list[V]:
    """A list that was passed on as it came. Raises: ServingError if it is none of this kind."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        path, sentence = explained(error, msgspec.json.decode(raw), name)
        raise invalid(sentence, path) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(bytes(raw), error) from error


KINDS: Final = {
    "int": "an integer", "float": "a number", "str": "a string", "bool": "true or false", "array": "a list",
    "object": "an object",
}  # fmt: skip


def explained(error: msgspec.ValidationError, document: Any, root: str = "") -> tuple[str, str]:
    """Path of the field that is wrong, and a sentence that names it, its value and what is expected."""
    text, _, place = str(error).partition(" - at `$")
    path = (root + place.rstrip("`")).lstrip(".")
    if match := re.fullmatch(r"Object missing required field `(\w+)`", text):
        path = f"{path}.{match[1]}".lstrip(".")
        return path, _missing(path)
    match = re.fullmatch(r"Expected `([^`]+)`, got `(\w+)`", text)
    if match is None:
        return path, f"'{path}': {text[:1].lower()}{text[1:]}"
    kinds = [KINDS[kind] for kind in match[1].split(" | ") if kind in KINDS]
    found = _value_at(document, place.rstrip("`"))
    return path, f"'{path}' must be {' or '.join(kinds)}, got {shown(found)}"


def _missing(path: str) -> str:
    return f"'{path}' is required"


def _value_at(document: Any, place: str) -> Any:
    """The value that a path of msgspec points to; as far as the path can be followed."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place):
        match document:
            case dict() if name:
                document = document.get(name)
            case list() if index.isdigit() and int(index) < len(document):
                document = document[int(index)]
            case _:
                break
    return document


def shown(value: Any) -> str:
    """A JSON value as it is told in a message: cut if it is long."""
    text = msgspec.json.encode(value).decode()
    if len(text) <= SHOWN_VALUE_CHARACTERS:
        return text
    return f"{text[:SHOWN_VALUE_CHARACTERS]}... ({len(text)} characters)"
