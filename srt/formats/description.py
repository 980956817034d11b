"""The formats that models write in, as data: parser, streaming and grammars all come from one `TextFormat`."""

from __future__ import annotations

from typing import Any, Final

import msgspec


class TextFormat(msgspec.Struct, frozen=True):
    """Marks around reasoning, tool calls, their functions and parameters.

    A call reads `call_open function_open NAME name_close parameter* function_close call_close`, a parameter
    `parameter_open KEY name_close VALUE parameter_close`; between two marks there may be white space. One
    `padding` belongs to the marks on either side of reasoning and of a value.
    """

    name: str
    think_open: str
    think_close: str
    call_open: str
    call_close: str
    function_open: str
    function_close: str
    parameter_open: str
    parameter_close: str
    name_close: str = ">"
    padding: str = "\n"
    """One character."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that are whole in themselves."""
        return (
            self.think_open, self.think_close, self.call_open, self.call_close, self.function_close,
            self.parameter_close,
        )  # fmt: skip


STEP: Final = TextFormat(
    name="step3p5",
    think_open="<think>",
    think_close="</think>",
    call_open="<tool_call>",
    call_close="</tool_call>",
    function_open="<function=",
    function_close="</function>",
    parameter_open="<parameter=",
    parameter_close="</parameter>",
)

FORMATS: Final = {STEP.name: STEP}
"""Every known format by the name that options use."""


class Function(msgspec.Struct, frozen=True):
    """What a client offers as a tool: its name and the JSON schema of its parameters."""

    name: str
    parameters: dict[str, Any] = {}
    strict: bool = False


class Formats(msgspec.Struct, frozen=True):
    """How one checkpoint writes; None where it is not known or not looked for."""

    reasoning: TextFormat | None = None
    calls: TextFormat | None = None
