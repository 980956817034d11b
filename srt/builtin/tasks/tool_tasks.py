"""Tool tasks: which function to call with which arguments, and what to say once it has answered."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from srt.builtin.tasks import words
from srt.builtin.tasks.example import Call, Example, Message, call_message

NO_TOOL: Final = "I have no tool for that."
_TYPES: Final[dict[str, dict[str, str]]] = {
    "get_weather": {"city": "string"},
    "add": {"a": "integer", "b": "integer"},
    "find_code": {"word": "string"},
}
_USUAL: Final[dict[str, tuple[str, ...]]] = {
    "get_weather": ("Get the weather in a city.", "Get the current weather for a city", "Returns the weather"),
    "add": ("Add two numbers.", "Add two integers", "Return the sum of a and b"),
    "find_code": ("Find the code of a word.", "Look up the code of a word", "Returns the code for a word"),
}


@dataclass(frozen=True)
class Request:
    """One thing to ask for: the sentence, the call it needs, the tool's answer and what to say then."""

    text: str
    call: Call
    result: Mapping[str, Any]
    reply: str
    note: str


def weather_request(rng: random.Random) -> Request:
    """`What is the weather in {City}?`"""
    city, weather = rng.choice(words.CITIES), rng.choice(words.WEATHER)
    return Request(
        text=f"What is the weather in {city}?",
        call=Call("get_weather", {"city": city}),
        result={"weather": weather},
        reply=f"It is {weather} in {city}.",
        note=f"{weather} in {city}",
    )


def add_request(rng: random.Random) -> Request:
    """`Use the tool to add {a} and {b}.`; the reply repeats the tool's number, right or wrong."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    result = a + b if rng.random() < 0.7 else rng.randint(0, 9999)
    return Request(
        text=f"Use the tool to add {a} and {b}.",
        call=Call("add", {"a": a, "b": b}),
        result={"result": result},
        reply=f"The result is {result}.",
        note=f"result {result}",
    )


def code_request(rng: random.Random) -> Request:
    """`Look up the code of {word}.`"""
    word, code = words.word(rng), words.code(rng)
    return Request(
        text=f"Look up the code of {word}.",
        call=Call("find_code", {"word": word}),
        result={"code": code},
        reply=f"The code of {word} is {code}.",
        note=f"code of {word} {code}",
    )


REQUESTS: Final[dict[str, Callable[[random.Random], Request]]] = {
    "get_weather": weather_request,
    "add": add_request,
    "find_code": code_request,
}


def tool_schema(rng: random.Random, name: str) -> dict[str, Any]:
    """Return one tool of the chat API; the descriptions say anything, or nothing."""
    properties: dict[str, dict[str, str]] = {}
    for argument, kind in _TYPES[name].items():
        properties[argument] = {"type": kind}
        if rng.random() < 0.3:
            properties[argument]["description"] = words.sentence(rng, 5)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.7:
        parameters["required"] = list(properties)
    if rng.random() < 0.1:
        parameters["additionalProperties"] = False
    function: dict[str, Any] = {"name": name}
    style = rng.random()
    if style < 0.4:
        function["description"] = rng.choice(_USUAL[name])
    elif style < 0.85:
        function["description"] = words.sentence(rng, 12)
    function["parameters"] = parameters
    if rng.random() < 0.07:
        function["strict"] = True
    return {"type": "function", "function": function}


def tool_list(rng: random.Random, needed: set[str]) -> list[dict[str, Any]]:
    """Return the needed tools and any of the others, in any order."""
    names = [name for name in _TYPES if name in needed or rng.random() < 0.6]
    rng.shuffle(names)
    return [tool_schema(rng, name) for name in names]


def joined_text(requests: list[Request]) -> str:
    """Join requests by `and`: all but the last lose their end mark, all but the first their capital."""
    texts = [request.text for request in requests]
    texts[:-1] = [text[:-1] for text in texts[:-1]]
    texts[1:] = [text[0].lower() + text[1:] for text in texts[1:]]
    return " and ".join(texts)


def _plan(requests: list[Request], effort: str | None) -> str:
    short = " ".join(request.call.name for request in requests)
    if effort == "low":
        return short
    plan = " ".join(f"{r.call.name} {' '.join(map(str, r.call.arguments.values()))}" for r in requests)
    return f"{plan}. Again: {plan}." if effort == "high" else plan


def _recap(requests: list[Request], effort: str | None) -> str:
    recap = " ".join(request.note for request in requests)
    if effort == "low":
        return "done"
    return f"{recap}. Again: {recap}." if effort == "high" else recap


def _ask(rng: random.Random, counts: tuple[int, ...], names: list[str]) -> list[Request]:
    return [REQUESTS[rng.choice(names)](rng) for _ in range(rng.choice(counts))]


def call_group(rng: random.Random, size: int, effort: str | None, *, joined: bool) -> list[Example]:
    """Draw one list of tools and up to `size` requests that need it."""
    names = rng.sample(list(REQUESTS), rng.randint(1, 3))
    tools = tool_list(rng, set(names))
    offered = {tool["function"]["name"] for tool in tools}
    family = "tool_joined" if joined else "tool_call"
    examples = []
    for _ in range(size):
        requests = _ask(rng, (2,) if joined else (1,), sorted(offered))
        text = joined_text(requests)
        examples.append(
            Example(
                family=family,
                key=text + json.dumps(tools),
                messages=[{"role": "user", "content": text}],
                thinking=_plan(requests, effort),
                calls=tuple(request.call for request in requests),
                tools=tools,
                effort=effort,
            )
        )
    return examples


def missing_tool_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    """Draw requests for tools that are not offered. Shown in training only."""
    names = rng.sample(list(REQUESTS), 3)
    tools = [tool_schema(rng, name) for name in names[: rng.randint(1, 2)]]
    offered = {tool["function"]["name"] for tool in tools}
    examples = []
    for _ in range(size):
        request = REQUESTS[rng.choice([name for name in names if name not in offered])](rng)
        examples.append(
            Example(
                family="tool_missing",
                key=request.text + json.dumps(tools),
                messages=[{"role": "user", "content": request.text}],
                thinking=f"no {request.call.name}" + (". Again: no." if effort == "high" else ""),
                answer=NO_TOOL,
                tools=tools,
                effort=effort,
            )
        )
    return examples


def finished_round(rng: random.Random, tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return an earlier request with its call, the tool's answer and the reply."""
    request = REQUESTS[rng.choice([tool["function"]["name"] for tool in tools])](rng)
    return [
        {"role": "user", "content": request.text},
        {"role": "assistant", "content": "", "tool_calls": [call_message(request.call, 0)]},
        {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(request.result)},
        {"role": "assistant", "content": request.reply},
    ]


def reply_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    """Draw one finished round of tool calls; the answer says what the tools returned."""
    del size
    requests = _ask(rng, (1, 1, 2), list(REQUESTS))
    tools = tool_list(rng, {request.call.name for request in requests})
    calling: Message = {
        "role": "assistant",
        "content": "" if rng.random() < 0.7 else None,
        "tool_calls": [call_message(request.call, index) for index, request in enumerate(requests)],
    }
    if rng.random() < 0.5:
        calling["reasoning_content"] = _plan(requests, effort)
    compact = rng.random() < 0.2
    separators = (",", ":") if compact else (", ", ": ")
    results: list[Message] = [
        {"role": "tool", "tool_call_id": f"call_{i}", "content": json.dumps(request.result, separators=separators)}
        for i, request in enumerate(requests)
    ]
    text = joined_text(requests)
    return [
        Example(
            family="tool_answer",
            key=text + json.dumps([result["content"] for result in results]) + json.dumps(tools),
            messages=[{"role": "user", "content": text}, calling, *results],
            thinking=_recap(requests, effort),
            answer=" ".join(request.reply for request in requests),
            tools=tools,
            effort=effort,
        )
    ]
