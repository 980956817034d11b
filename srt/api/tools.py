"""Tools of a chat: which there are, which of them must be called, and how answers are to be read."""

from __future__ import annotations

from typing import Final

import msgspec

from srt.api.bodies import NO_VALUE, ChatBody, FunctionTool, TokenizeBody, decoded_list, invalid, shown
from srt.errors import ErrorCode, ServingError
from srt.formats.answer import Reading
from srt.formats.description import Formats, Function
from srt.formats.grammar import call_grammar
from srt.formats.marks import MAX_NAME_CHARACTERS
from srt.messages import Constraint

CHOICES: Final = ("auto", "none", "required")


class Choice:
    """Which of the tools of a chat are offered, and how many calls there must be.

    Raises: ServingError if the tools or the choice are not such.
    """

    def __init__(self, body: ChatBody | TokenizeBody) -> None:
        self.tools = functions_of(body.tools)
        self.named: str | None = None
        choice = body.tool_choice
        match choice:
            case None | "auto" | "none" | "required":
                pass
            case {"type": "function", "function": {"name": str(name)}}:
                self.named = name
            case other:
                raise invalid(
                    f"'tool_choice' is {shown(other)}, it must be one of {', '.join(CHOICES)}, or "
                    '{"type": "function", "function": {"name": ...}}',
                    "tool_choice",
                )
        self.must_call = choice == "required" or self.named is not None
        self.offers = bool(self.tools) and choice != "none"
        if self.must_call and not self.tools:
            raise invalid(f"'tool_choice' is {shown(choice)}, but there are no 'tools'", "tool_choice")
        if self.named is not None and self.named not in {tool.name for tool in self.tools}:
            raise invalid(f"'tool_choice' names {shown(self.named)}, which is not among the 'tools'", "tool_choice")

    def callable(self) -> tuple[Function, ...]:
        """The functions that may be called."""
        return tuple(tool for tool in self.tools if self.named in (None, tool.name))


def functions_of(tools: msgspec.Raw) -> tuple[Function, ...]:
    """The functions in `tools`. Raises: ServingError if they are none."""
    if tools == NO_VALUE:
        return ()
    functions: dict[str, Function] = {}
    for index, tool in enumerate(decoded_list(tools, "tools", list[FunctionTool])):
        where, name = f"tools[{index}]", tool.function.name
        if tool.type != "function":
            raise invalid(f"'{where}.type' is {shown(tool.type)}, it must be function", f"{where}.type")
        _check_name(name, f"{where}.function.name")
        if name in functions:
            raise invalid(f"'{where}.function.name' is {shown(name)}, as of another tool", f"{where}.function.name")
        functions[name] = Function(name, tool.function.parameters or {}, strict=bool(tool.function.strict))
    return tuple(functions.values())


def _check_name(name: str, where: str) -> None:
    """Names stand between marks in what the model writes."""
    if not name.strip() or name != name.strip() or any(character in name for character in "<>\n"):
        raise invalid(f"'{where}' is {shown(name)}: it must not be blank, nor hold '<', '>' or line breaks", where)
    if len(name) > MAX_NAME_CHARACTERS:
        raise invalid(f"'{where}' has {len(name)} characters, the limit is {MAX_NAME_CHARACTERS}", where)


def reading_of(body: ChatBody, choice: Choice, formats: Formats) -> Reading:
    """How the answers to a chat are to be read."""
    calls = formats.calls if choice.offers else None
    return Reading(
        reasoning=None if body.separate_reasoning is False else formats.reasoning,
        calls=calls,
        tools=choice.tools if calls is not None else (),
        shows_reasoning=body.include_reasoning is not False,
        streams_reasoning=body.stream_reasoning is not False,
        most_calls=1 if body.parallel_tool_calls is False else None,
    )


def call_constraint(body: ChatBody, choice: Choice, formats: Formats, asked: Constraint | None) -> Constraint:
    """What makes the model call a tool. `asked`: the form that the answer is to have otherwise.

    Raises: ServingError if there is such a form, or the model cannot be made to call.
    """
    if asked is not None:
        raise invalid(
            f"'tool_choice' is {shown(body.tool_choice)}, which makes the answer a call; '{asked.field}' makes it "
            "something else",
            asked.field,
        )
    if formats.calls is None:
        raise ServingError(
            ErrorCode.UNSUPPORTED_FIELD,
            f"'tool_choice' is not supported with the value {shown(body.tool_choice)}: the server knows no format of "
            "tool calls for this model (--tool-call-parser)",
            "tool_choice",
        )
    single = choice.named is not None or body.parallel_tool_calls is False
    text = call_grammar(formats.calls, choice.callable(), single=single)
    return Constraint("structural_tag", text, after_thinking=True, field="tool_choice")
