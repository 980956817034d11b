"""The parsers of answers on their own: what the server would make of a text."""

from __future__ import annotations

from typing import Any

from srt.api.bodies import FunctionCallBody, Notice, Parser, SeparateReasoningBody, invalid, shown
from srt.api.fields import Body
from srt.api.http import Exchange
from srt.api.service import Service
from srt.api.tools import functions_of
from srt.formats.answer import Parsed, parse
from srt.formats.description import FORMATS, TextFormat
from srt.formats.reader import ReadOptions


class Parsing:
    """The endpoints. Nothing is generated."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._calls = Parser(Body.FUNCTION_CALL, FunctionCallBody)
        self._reasoning = Parser(Body.SEPARATE_REASONING, SeparateReasoningBody)

    async def parse_function_call(self, exchange: Exchange) -> None:
        """`/parse_function_call`: the calls in a text that stands behind the reasoning, and the text around them."""
        body, notices = await self._service.read(exchange, self._calls)
        form = _format(body.tool_call_parser, self._service.formats.calls, "tool_call_parser")
        tools = functions_of(body.tools)
        said = parse(body.text, form, tools, ReadOptions(thinking=False, reasoning=False))
        places = {tool.name: index for index, tool in enumerate(tools)}
        answer = {
            "normal_text": said.content,
            "calls": [
                {"tool_index": places.get(call.name, -1), "name": call.name, "parameters": call.arguments}
                for call in said.calls
            ],
        }
        await exchange.respond_json(answer | _warnings(said, notices))

    async def separate_reasoning(self, exchange: Exchange) -> None:
        """`/separate_reasoning`: a text that begins within the reasoning, as reasoning and what is said."""
        body, notices = await self._service.read(exchange, self._reasoning)
        form = _format(body.reasoning_parser, self._service.formats.reasoning, "reasoning_parser")
        said = parse(body.text, form, (), ReadOptions(calls=False))
        await exchange.respond_json({"reasoning_text": said.reasoning, "text": said.content} | _warnings(said, notices))


def _format(asked: str | None, usual: TextFormat | None, field: str) -> TextFormat:
    """The format of this name; without one, the server's own. Raises: ServingError if there is none."""
    found = usual if asked in (None, "auto") else FORMATS.get(str(asked))
    if found is None:
        raise invalid(f"'{field}' is {shown(asked)}, it must be one of {', '.join(FORMATS)}", field)
    return found


def _warnings(said: Parsed, notices: tuple[Notice, ...]) -> dict[str, Any]:
    warnings = [*(notice.text for notice in notices), *(problem.told() for problem in said.problems)]
    return {"warnings": warnings} if warnings else {}
