"""Chats taken apart, over HTTP, with answers that are written down here: what clients see of calls and reasoning.

`golden_chats.json` holds whole bodies, as golden.json of tests/api/test_golden.py does; after a change that is meant,
`python -m tests.api.test_chats` writes it anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.api.test_generate import events
from tests.api.test_golden import masked, told
from tests.support.front import Front
from tests.support.server import Answer
from tests.support.tokens import VOCAB_SIZE, write_tokenizer

EOS = 1
CONTINUES = "continue_final_message"
USER = {"role": "user", "content": "hello"}
OPEN = {"role": "assistant", "content": "<think>"}
"""Continued, it leaves the model thinking: the template of these tests opens no reasoning."""
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "note": {"type": "string"}}}},
}
PARAMETERS = "<parameter=a>\n5\n</parameter>\n<parameter=note>\nx\n</parameter>\n"
CALL = f"<tool_call>\n<function=add>\n{PARAMETERS}</function>\n</tool_call>"


GOLDEN = Path(__file__).parent / "golden_chats.json"
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
WRITTEN = f"hm\n</think>\nLook:\n{CALL}\n{CALL}"
CHATS: dict[str, tuple[str, dict[str, Any]]] = {
    "calls": (WRITTEN, {"tools": [ADD]}),
    "calls streamed": (WRITTEN, {"tools": [ADD], **STREAMED}),
    "one call": (WRITTEN, {"tools": [ADD], "parallel_tool_calls": False}),
    "no tools": (WRITTEN, {}),
    "reasoning inside": (WRITTEN, {"tools": [ADD], "separate_reasoning": False}),
    "reasoning left out, streamed": (WRITTEN, {"tools": [ADD], "include_reasoning": False, **STREAMED}),
    "malformed": ("</think><tool_call>add</tool_call>", {"tools": [ADD]}),
    "malformed streamed": ("</think><tool_call>add</tool_call>", {"tools": [ADD], **STREAMED}),
    "thinking only": ("hm", {}),
}
FORMATS: dict[str, Any] = {
    "served_model_name": "test-model", "reasoning_parser": "step3p5", "tool_call_parser": "step3p5"
}  # fmt: skip


@pytest.fixture(scope="module")
def parsing(model: Path) -> Iterator[Front]:
    """A front that knows Step's format."""
    with Front(model, vocab_size=VOCAB_SIZE, **FORMATS) as running:
        yield running


def golden(front: Front, tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """A chat whose answer comes in one step, as it is written down."""
    text, fields = CHATS[name]
    answer = chat(front, tokenizer, text, **fields)
    return {"written": text, "fields": fields, "status": answer.status, "answer": told(answer)}


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_is_the_one_that_is_written_down(parsing: Front, tokenizer: Tokenizer, name: str) -> None:
    assert golden(parsing, tokenizer, name) == json.loads(GOLDEN.read_text())[name]


def chat(
    front: Front, tokenizer: Tokenizer, text: str, *, end: bool = True, tokens_per_step: int = 1000, **fields: Any
) -> Answer:
    """A chat in which the model says `text`, and ends its turn or is cut off."""
    body = {"messages": [USER, OPEN], CONTINUES: True} | fields
    shown = {
        name: body[name] for name in ("messages", "tools", "tool_choice", "continue_final_message") if name in body
    }
    prompt = front.post("/tokenize", shown).json["tokens"]
    reply = [*tokenizer.encode(text, add_special_tokens=False).ids, *([EOS] if end else [])]
    limit = {} if end else {"max_tokens": len(reply)}
    with front.behaving(replies={tuple(prompt): reply}, tokens_per_step=tokens_per_step):
        return front.post("/v1/chat/completions", body | limit)


def in_a_row(text: str) -> dict[str, Any]:
    """A call as it is told, but for its id."""
    return {"type": "function", "function": {"name": "add", "arguments": text}}


def test_a_chat_with_calls_is_told_as_openai_tells_it(parsing: Front, tokenizer: Tokenizer) -> None:
    answer = chat(parsing, tokenizer, f"hm\n</think>\nLook:\n{CALL}\n{CALL}\n", tools=[ADD]).json
    [first, second] = answer["choices"][0]["message"]["tool_calls"]
    assert first.pop("id").startswith("call_")
    assert second.pop("id").startswith("call_")
    [choice] = masked(answer)["choices"]
    call = in_a_row('{"a": 5, "note": "x"}')
    assert choice["message"] == {
        "role": "assistant", "content": "Look:", "reasoning_content": "hm", "tool_calls": [call, call]
    }  # fmt: skip
    assert (choice["finish_reason"], choice["matched_stop"], choice["logprobs"]) == ("tool_calls", EOS, None)
    assert answer["usage"]["reasoning_tokens"] == len(tokenizer.encode("hm\n</think>").ids)
    assert "warnings" not in answer


def test_a_streamed_chat_with_calls_is_told_in_the_order_of_openai(parsing: Front, tokenizer: Tokenizer) -> None:
    said = chat(parsing, tokenizer, f"hm\n</think>\nLook:\n{CALL}", tools=[ADD], stream=True)
    chunks = [event["choices"][0] for event in events(said)]
    call_id = chunks[3]["delta"]["tool_calls"][0].pop("id")
    assert call_id.startswith("call_")
    assert [chunk["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "reasoning_content": None},
        {"content": None, "reasoning_content": "hm"},
        {"content": "Look:", "reasoning_content": None},
        {"content": None, "reasoning_content": None, "tool_calls": [{"index": 0, **in_a_row("")}]},
        {
            "content": None,
            "reasoning_content": None,
            "tool_calls": [{"index": 0, "function": {"arguments": '{"a": 5, "note": "x"}'}}],
        },
        {"reasoning_content": None},
    ]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 5 + ["tool_calls"]


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 5, 8, 13])
def test_a_stream_joins_to_the_whole_answer_however_many_tokens_a_step(
    parsing: Front, tokenizer: Tokenizer, tokens_per_step: int
) -> None:
    text = f"think <tool_call> of it\n</think>\n\nÜber {{}}\n{CALL}{CALL}"
    whole = chat(parsing, tokenizer, text, tools=[ADD]).json["choices"][0]["message"]
    said = chat(parsing, tokenizer, text, tools=[ADD], stream=True, tokens_per_step=tokens_per_step)
    deltas = [event["choices"][0]["delta"] for event in events(said)]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == whole[name]
    parts = [part for delta in deltas for part in delta.get("tool_calls") or ()]
    for index, call in enumerate(whole["tool_calls"]):
        arguments = [part["function"].get("arguments", "") for part in parts if part["index"] == index]
        assert "".join(arguments) == call["function"]["arguments"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_call_is_told_in_warnings(parsing: Front, tokenizer: Tokenizer, stream: bool) -> None:
    said = chat(parsing, tokenizer, "</think><tool_call>{}</tool_call>", tools=[ADD], stream=stream)
    last = events(said)[-1] if stream else said.json
    assert last["warnings"] == ["choice 0: tool calls: <tool_call> without a function is kept as content"]
    assert last["choices"][0]["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_is_no_call_to_be_made(parsing: Front, tokenizer: Tokenizer) -> None:
    text = "</think><tool_call>\n<function=add>\n<parameter=note>\nrm -rf /"
    answer = chat(parsing, tokenizer, text, end=False, tools=[ADD]).json
    [choice] = answer["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "length"
    assert call["function"]["arguments"] == '{"note": "rm -rf /'
    assert "cut off" in answer["warnings"][0]


def test_a_stop_text_of_the_clients_leaves_the_call_open_too(parsing: Front, tokenizer: Tokenizer) -> None:
    text = "</think><tool_call>\n<function=add>\n<parameter=note>\nrm -rf /tmp/x"
    [choice] = chat(parsing, tokenizer, text, tools=[ADD], stop="tmp").json["choices"]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", "tmp")
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_without_tools_or_with_none_wanted_a_call_is_content(parsing: Front, tokenizer: Tokenizer) -> None:
    unwanted: dict[str, Any] = {"tools": [ADD], "tool_choice": "none"}
    for fields in ({}, unwanted):
        [choice] = chat(parsing, tokenizer, f"</think>\n{CALL}", **fields).json["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


def test_a_function_call_is_parsed_alone_as_it_is_in_an_answer(parsing: Front) -> None:
    answer = parsing.post("/parse_function_call", {"text": f"Look:\n{CALL}", "tools": [ADD]}).json
    assert answer == {
        "normal_text": "Look:", "calls": [{"tool_index": 0, "name": "add", "parameters": '{"a": 5, "note": "x"}'}]
    }  # fmt: skip
    unknown = parsing.post("/parse_function_call", {"text": CALL, "tool_call_parser": "step3p5"}).json
    assert unknown["calls"] == [{"tool_index": -1, "name": "add", "parameters": '{"a": "5", "note": "x"}'}]
    assert unknown["warnings"] == ["tool call 0 (add): the function is not among the tools"]


def test_reasoning_is_separated_alone_as_it_is_in_an_answer(parsing: Front) -> None:
    body = {"text": "<think>\nhm\n</think>\nyes", "reasoning_parser": "auto"}
    assert parsing.post("/separate_reasoning", body).json == {"reasoning_text": "hm", "text": "yes"}


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = write_tokenizer(Path(directory))
        with Front(Path(directory), vocab_size=VOCAB_SIZE, **FORMATS) as front:
            found = {name: golden(front, tokenizer, name) for name in CHATS}
    GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
