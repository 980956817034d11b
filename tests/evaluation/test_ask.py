"""Asking a server: every shape of answer is read, and what goes wrong is counted, not hidden."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from srt.builtin.tasks import Call, Example, evaluation_set
from srt.errors import StartupError
from srt.evaluation.ask import Questions, ask_all
from srt.evaluation.score import score
from tests.evaluation.scripted import Scripted, event, whole
from tests.support.server import free_port


def difference(body: dict[str, Any]) -> str:
    """The right answer to a problem of the family `difference`."""
    a, b = map(int, re.findall(r"\d+", body["messages"][-1]["content"]))
    return str(a - b)


def test_reasoning_is_read_from_the_text_or_from_its_own_field() -> None:
    shapes = [
        lambda body: whole({"content": f"so\n</think>\n{difference(body)}"}),
        lambda body: whole({"content": difference(body), "reasoning_content": "so"}),
    ]
    for shape in shapes:
        asked = asyncio.run(Scripted(shape).ask("difference", count=3)).asked["difference"]
        assert [item.right for item in asked] == [True] * 3
        assert asked[0].reply.message["reasoning_content"] == "so"


def calls_of(body: dict[str, Any]) -> tuple[Call, ...]:
    """The calls that a problem of the family `tool_joined` needs."""
    return next(one.calls for one in JOINED if one.messages[-1]["content"] == body["messages"][-1]["content"])


JOINED: list[Example] = evaluation_set("tool_joined", 4)


def test_tool_calls_are_read_from_their_own_field_too() -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        calls = [
            {"id": call.name, "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))}}
            for call in calls_of(body)
        ]
        return whole({"content": None, "reasoning_content": "so", "tool_calls": calls}, finish="tool_calls")

    asked = asyncio.run(Scripted(answer).ask("tool_joined", count=4)).asked["tool_joined"]
    assert [item.right for item in asked] == [True] * 4


def test_streamed_tool_calls_are_put_together() -> None:
    def answer(body: dict[str, Any]) -> list[str]:
        events = [event({"role": "assistant", "content": "", "reasoning_content": None})]
        events += [event({"reasoning_content": part}) for part in ("s", "o")]
        for index, call in enumerate(calls_of(body)):
            text = json.dumps(dict(call.arguments))
            events.append(event({"tool_calls": [{"index": index, "function": {"name": call.name, "arguments": ""}}]}))
            for part in (text[:4], text[4:]):
                events.append(event({"tool_calls": [{"index": index, "function": {"arguments": part}}]}))
        return [
            *events,
            event({}, "tool_calls"),
            json.dumps({"choices": [], "usage": {"completion_tokens": 9}}),
            "[DONE]",
        ]

    scripted = Scripted(answer)
    asked = asyncio.run(scripted.ask("tool_joined", count=4, stream=True)).asked["tool_joined"]
    assert [item.right for item in asked] == [True] * 4
    assert asked[0].reply.tokens == 9
    assert all(body["stream"] and body["tools"] for body in scripted.bodies)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"error": {"message": "out of memory"}}', "[DONE]"], "out of memory"),
        ([event({"content": "42"}, "stop")], "broke off"),
        ([event({"content": "42"}, "stop"), "[DONE]"], "without usage"),
        (["{broken", "[DONE]"], "JSONDecodeError"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(lines: list[str], sentence: str) -> None:
    asked = asyncio.run(Scripted(lambda body: lines).ask("sum", count=2, stream=True)).asked["sum"]
    assert all(sentence in item.reply.error for item in asked)


def test_an_answer_that_was_cut_off_is_wrong() -> None:
    answer = Scripted(lambda body: whole({"content": difference(body), "reasoning_content": ""}, finish="length"))
    assert not any(item.right for item in asyncio.run(answer.ask("difference", count=2)).asked["difference"])


def test_errors_are_counted_and_have_no_latency() -> None:
    answers = asyncio.run(Scripted(lambda body: {"error": "full"}, status=429).ask("sum", count=3))
    row = score("sum", answers.asked["sum"])
    assert (row.right, row.errors, row.accuracy) == (0, 3, 0.0)
    assert "status 429" in answers.asked["sum"][0].reply.error
    assert row.cells()[-1] == "nan"


def test_tokens_a_step_come_from_the_server_or_are_one() -> None:
    counted = Scripted(lambda body: whole({"content": "x"}, spec_verify_ct=4))
    assert score("sum", asyncio.run(counted.ask("sum", count=2)).asked["sum"]).step_tokens == 3.0
    mixed = Scripted(lambda body: whole({"content": "x"}, spec_verify_ct=1, spec_plain_ct=5))
    assert score("sum", asyncio.run(mixed.ask("sum", count=2)).asked["sum"]).step_tokens == 2.0
    uncounted = Scripted(lambda body: whole({"content": "x"}))
    assert score("sum", asyncio.run(uncounted.ask("sum", count=2)).asked["sum"]).step_tokens == 1.0


def test_images_are_sent_only_to_a_server_that_sees_them() -> None:
    blind = Scripted(lambda body: whole({"content": "x"}))
    answers = asyncio.run(blind.ask("image_object", "sum", count=2))
    assert (answers.skipped, list(answers.asked)) == (("image_object",), ["sum"])
    seeing = Scripted(lambda body: whole({"content": "x"}), sees_images=True)
    assert list(asyncio.run(seeing.ask("image_object", count=2)).asked) == ["image_object"]
    parts = seeing.bodies[0]["messages"][0]["content"]
    assert any(part["type"] == "image_url" for part in parts)


def test_one_seed_asks_the_same_with_the_key() -> None:
    first, again = (Scripted(lambda body: whole({"content": "x"})) for _ in range(2))
    for scripted in (first, again):
        asyncio.run(scripted.ask("effort", "json", count=5, concurrency=1, seed=3, api_key="secret"))
    assert first.bodies == again.bodies
    assert first.keys == ["Bearer secret"] * 10
    assert sum("reasoning_effort" in body for body in first.bodies) == 5


def test_no_server_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StartupError, match=rf"--url {url}: no server answers there"):
        asyncio.run(ask_all(Questions(url, ("sum",)), quiet=True))
