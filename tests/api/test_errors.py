"""What is refused: with the status, the field, the value and the limit; nothing of Python in it."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import pytest

from srt.api.streams import Streams
from tests.support.front import Front
from tests.support.raw import RawConnection

NATIVE, COMPLETION, CHAT, TOKENIZE = "/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"
USER = {"role": "user", "content": "x"}


def sampled(**params: Any) -> dict[str, Any]:
    """A native body with sampling parameters."""
    return {"text": "x", "sampling_params": params}


SCORED: dict[str, Any] = {"text": "x", "return_logprob": True}

TOOL = {"type": "function", "function": {"name": "look_up"}}
REFUSED: list[tuple[str, Any, str, str | None]] = [
    (NATIVE, {}, "exactly one of 'text' and 'input_ids' is required, got neither", "text"),
    (NATIVE, {"text": "x", "input_ids": [5]}, "got both", "text"),
    (NATIVE, {"text": ""}, "'text' is empty", "text"),
    (NATIVE, {"text": []}, "'text' is empty", "text"),
    (NATIVE, {"text": ["x", ""]}, "'text[1]' is empty", "text[1]"),
    (NATIVE, {"text": ["x"] * 65}, "'text' has 65 prompts, the limit is 64", "text"),
    (NATIVE, {"input_ids": []}, "'input_ids' is empty", "input_ids"),
    (NATIVE, {"input_ids": [[5], []]}, "'input_ids[1]' is empty", "input_ids[1]"),
    (NATIVE, {"input_ids": [5, [5]]}, "'input_ids' mixes token ids and lists", "input_ids"),
    (NATIVE, {"input_ids": [5, True]}, "'input_ids[1]' must be an integer or a list, got true", "input_ids[1]"),
    (NATIVE, {"input_ids": [5, -1]}, "'input_ids[1]' is -1, token ids of this model are 0 to 511", "input_ids"),
    (NATIVE, {"input_ids": [[512]]}, "'input_ids[0][0]' is 512", "input_ids[0]"),
    (NATIVE, {"input_ids": [10**30]}, "1000000000000000000000000000000", "input_ids"),
    (NATIVE, {"input_ids": [5] * 513}, "has 513 tokens, the context length is 512 tokens", "input_ids"),
    (NATIVE, {"input_ids": [5] * 512}, "the prompt has 512 tokens; the context length is 512 tokens", "prompt"),
    (NATIVE, {"text": 7, "stream": "yes"}, "'text' must be a string or a list, got 7; 'stream' must be true", "text"),
    (NATIVE, sampled(temperature="hot"), "'sampling_params.temperature' must be a number, got \"hot\"", None),
    (NATIVE, sampled(temperature=-0.5), "'temperature' is -0.5, it must be 0 or more", "temperature"),
    (NATIVE, sampled(top_p=0), "'top_p' is 0.0, it must be above 0 and at most 1", "top_p"),
    (NATIVE, sampled(top_k=-2), "'top_k' is -2, it must be between -1 and", "top_k"),
    (NATIVE, sampled(min_p=1.5), "'min_p' is 1.5, it must be between 0 and 1", "min_p"),
    (NATIVE, sampled(max_new_tokens=-1), "'max_new_tokens' is -1, it must be between 0 and", "max_new_tokens"),
    (NATIVE, sampled(max_new_tokens=True), "must be an integer, got true", "sampling_params.max_new_tokens"),
    (NATIVE, sampled(max_new_tokens=2.0), "must be an integer, got 2.0", "sampling_params.max_new_tokens"),
    (NATIVE, sampled(max_new_tokens=512), "512 new tokens after a prompt of 1 tokens make 513", "max_new_tokens"),
    (NATIVE, sampled(min_new_tokens=200), "'min_new_tokens' is 200, more than 'max_new_tokens' which is 128", None),
    (NATIVE, sampled(sampling_seed=2**63), "'sampling_seed' is 9223372036854775808", "sampling_seed"),
    (NATIVE, sampled(stop=["a"] * 33), "'stop' has 33 texts, the limit is 32", "stop"),
    (NATIVE, sampled(stop="a" * 257), "'stop[0]' has 257 characters, the limit is 256", "stop"),
    (NATIVE, sampled(stop=[""]), "'stop[0]' is empty", "stop"),
    (NATIVE, sampled(stop_token_ids=[512]), "'stop_token_ids[0]' is 512", "stop_token_ids"),
    (NATIVE, sampled(stop_token_ids=[5] * 257), "has 257 entries, the limit is 256", "stop_token_ids"),
    (NATIVE, sampled(n=0), "'n' is 0, it must be between 1 and 128", "n"),
    (NATIVE, sampled(n=65), "'n' is 65, with 1 prompts; the limit is 64 answers a call", "n"),
    (NATIVE, {"text": "x", "n": 2}, "'n' is not supported with the value 2: it belongs into sampling_params", "n"),
    (NATIVE, {"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]}, "'n' must be the same in all", "n"),
    (NATIVE, sampled(frequency_penalty=2.5), "'frequency_penalty' is 2.5, it must be between -2 and 2", None),
    (NATIVE, sampled(presence_penalty=-3), "'presence_penalty' is -3.0, it must be", "presence_penalty"),
    (NATIVE, sampled(repetition_penalty=0), "'repetition_penalty' is 0.0, it must be above 0", "repetition_penalty"),
    (NATIVE, sampled(logit_bias={"512": 1}), "'logit_bias' names the token \"512\", token ids of", "logit_bias"),
    (NATIVE, sampled(logit_bias={"-1": 1}), "'logit_bias' names the token \"-1\"", "logit_bias"),
    (NATIVE, sampled(logit_bias={"1" * 5000: 1}), "'logit_bias' names the token", "logit_bias"),
    (NATIVE, sampled(logit_bias={"5": 101}), "'logit_bias' of token 5 is 101.0, it must be", "logit_bias"),
    (NATIVE, {"text": ["x", "y"], "sampling_params": [{}]}, "has 1 entries for 2 prompts", "sampling_params"),
    (NATIVE, {"text": "x", "sampling_params": 3}, "'sampling_params' must be an object or a list, got 3", None),
    (NATIVE, {"text": "x", "return_logprob": [True, True]}, "has 2 entries for 1 prompts", "return_logprob"),
    (NATIVE, SCORED | {"logprob_start_len": 1}, "is 1, it must be less than the prompt's 1 tokens", None),
    (NATIVE, SCORED | {"logprob_start_len": -2}, "'logprob_start_len' is -2, it must be -1 or", "logprob_start_len"),
    (NATIVE, SCORED | {"top_logprobs_num": 129}, "'top_logprobs_num' is 129, it must be", "top_logprobs_num"),
    (NATIVE, SCORED | {"token_ids_logprob": [512]}, "names the token 512, token ids of", "token_ids_logprob"),
    (NATIVE, SCORED | {"token_ids_logprob": [5, [6]]}, "mixes token ids and lists of them", "token_ids_logprob"),
    (NATIVE, {"text": "x", "image_data": "data:"}, "this model takes no images", "image_url"),
    (NATIVE, {"text": "x", "rid": ""}, "'rid' is \"\", it must have 1 to 128 visible ASCII characters", "rid"),
    (NATIVE, {"text": "x", "rid": "a\nb"}, "visible ASCII", "rid"),
    (NATIVE, {"text": ["x", "y"], "rid": ["a", "a"]}, "'rid' contains \"a\" more than once", "rid"),
    (NATIVE, {"text": "x", "cache_salt": "s" * 257}, "'cache_salt' has 257 characters, the limit is 256", "cache_salt"),
    (NATIVE, [], "the body must be a JSON object, got []", None),
    (NATIVE, b"{", "not valid JSON", None),
    (NATIVE, b"", "not valid JSON", None),
    (NATIVE, b'{"text": NaN}', "not valid JSON", None),
    (NATIVE, b'{"text": "x", "sampling_params": {"top_p": Infinity}}', "not valid JSON", None),
    (NATIVE, b'{"text": "x", "sampling_params": {"top_p": 1e999}}', "not valid JSON", None),
    (NATIVE, b'{"text": "\\ud800"}', "no low surrogate in string: line 1", None),
    (NATIVE, b'{"text": "\xff"}', "not valid JSON: str is not valid UTF-8", None),
    (NATIVE, b'{"text":' + b"[" * 50_000, "depth limit exceeded", None),
    (COMPLETION, {}, "'prompt' is required", "prompt"),
    (COMPLETION, {"prompt": ["x", 5]}, "'prompt' mixes texts and token ids", "prompt"),
    (COMPLETION, {"prompt": [5, "x"]}, "'prompt' mixes texts and token ids", "prompt"),
    (COMPLETION, {"prompt": "x", "logprobs": 21}, "'logprobs' is 21, it must be between 0 and 20", "logprobs"),
    (COMPLETION, {"prompt": "x", "max_tokens": 0}, "'max_tokens' is 0, it must be between 1 and", "max_tokens"),
    (COMPLETION, {"prompt": "x", "request_id": ""}, "'request_id' is \"\", it must have 1 to 128", "request_id"),
    (COMPLETION, {"prompt": "x", "rid": "a", "request_id": "b"}, "'rid' and 'request_id' are one thing", "request_id"),
    (COMPLETION, {"prompt": "x", "n": True}, "'n' must be an integer, got true", "n"),
    (COMPLETION, {"prompt": "x", "n": 2, "best_of": 3}, "'best_of' is not supported with the value 3", "best_of"),
    (COMPLETION, {"prompt": "x", "suffix": "y"}, "'suffix' is not supported", "suffix"),
    (COMPLETION, {"prompt": "x", "stream_options": {}}, "'stream_options' needs 'stream': true", "stream_options"),
    (TOKENIZE, {"prompt": "x", "tools": []}, "'tools' goes with 'messages', not with 'prompt'", "tools"),
    (TOKENIZE, {"prompt": "x", "reasoning_effort": "low"}, "'reasoning_effort' goes with", "reasoning_effort"),
    (TOKENIZE, {"messages": [USER], "add_special_tokens": True}, "goes with 'prompt'", "add_special_tokens"),
    (CHAT, {}, "'messages' is required", "messages"),
    (CHAT, {"messages": [USER], "top_logprobs": 2}, "'top_logprobs' needs 'logprobs': true", "top_logprobs"),
    (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "it must be between 0 and 20", "top_logprobs"),
    (CHAT, {"messages": []}, "'messages' is empty", "messages"),
    (CHAT, {"messages": "x"}, "'messages' must be a list, got \"x\"", "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, "'messages[0].role' is required", "messages[0].role"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "'messages[0].role' is \"king\", it must be one of", None),
    (CHAT, {"messages": [{"role": "user"}]}, "'messages[0].content' is required", "messages[0].content"),
    (
        CHAT,
        {"messages": [USER, {"role": "user", "content": 5}]},
        "'messages[1].content' must be",
        "messages[1].content",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "this model takes no images",
        "image_url",
    ),
    (
        CHAT,
        {"messages": [USER], "tools": [{"type": "function"}]},
        "'tools[0].function' is required",
        "tools[0].function",
    ),
    (
        CHAT,
        {"messages": [USER], "tool_choice": "required"},
        "'tool_choice' is \"required\", but there are no 'tools'",
        None,
    ),
    (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "required"}, "knows no format of tool calls", None),
    (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "any"}, "'tool_choice' is \"any\", it must be", None),
    (
        CHAT,
        {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "'tool_choice' names \"x\", which is not among the 'tools'",
        "tool_choice",
    ),
    (CHAT, {"messages": [USER], "tools": [TOOL, TOOL]}, "as of another tool", "tools[1].function.name"),
    (CHAT, {"messages": [USER], "tools": [{"function": {"name": "a>b"}}]}, "nor hold '<', '>'", None),
    (CHAT, {"messages": [USER], "tools": [{"function": {"name": "a" * 257}}]}, "257 characters, the limit is", None),
    (
        CHAT,
        {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "regex": "a"},
        "which makes the answer a call; 'regex' makes it something else",
        "regex",
    ),
    ("/parse_function_call", {"text": "x", "tool_call_parser": "hermes"}, "must be one of step3p5", "tool_call_parser"),
    ("/separate_reasoning", {"text": "x"}, "'reasoning_parser' is null, it must be one of step3p5", "reasoning_parser"),
    (CHAT, {"messages": [USER], "reasoning_effort": "max"}, '"max", it must be one of none, low, medium, high', None),
    (CHAT, {"messages": [USER], "response_format": {"type": "xml"}}, '"xml", it must be one of text', None),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_schema"}}, "schema' is required", None),
    (
        CHAT,
        {"messages": [USER], "response_format": {"type": "json_object"}, "regex": "a"},
        "'response_format' and 'regex'",
        "regex",
    ),
    (
        CHAT,
        {"messages": [USER], "structured_outputs": {"json": "{"}},
        "'structured_outputs.json' cannot be obeyed: it is not",
        None,
    ),
    (CHAT, {"messages": [USER], "regex": ""}, "'regex' cannot be obeyed: it is empty", "regex"),
    (CHAT, {"messages": [USER], "json_schema": ""}, "'json_schema' cannot be obeyed: it is empty", "json_schema"),
    (NATIVE, {"text": "x", "sampling_params": {"ebnf": ""}}, "'ebnf' cannot be obeyed: it is empty", "ebnf"),
    (CHAT, {"messages": [USER], "structured_outputs": {"lark": "a"}}, "it must be one of json, json_object", None),
    (NATIVE, {"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}, "'regex' and 'ebnf' are given", "ebnf"),
    (CHAT, {"messages": [USER], "chat_template": "{{ x }}"}, "'chat_template' is not supported", "chat_template"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": {"tools": []}}, "must not set 'tools'", "chat_template_kwargs"),
    (CHAT, {"messages": [{"role": "tool", "content": "refuse"}]}, "no such tool result", "messages"),
    ("/tokenize", {}, "exactly one of 'prompt' and 'messages' is required, got neither", "prompt"),
    ("/tokenize", {"prompt": "x", "messages": [USER]}, "got both", "prompt"),
    ("/detokenize", {"tokens": [600]}, "'tokens[0]' is 600", "tokens"),
    ("/abort_request", {}, "'rid' is required, or 'abort_all': true", "rid"),
]


@pytest.mark.parametrize(("path", "body", "told", "param"), REFUSED, ids=range(len(REFUSED)))
def test_a_bad_body_is_refused_with_field_value_and_limit(
    front: Front, path: str, body: Any, told: str, param: str | None
) -> None:
    with RawConnection(front.port) as connection:
        status, headers, raw = connection.post(path, body).response()
    assert status == 400, raw
    assert headers["content-type"] == "application/json"
    error = json.loads(raw)["error"]
    assert told in error["message"]
    assert param is None or error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not any(word in error["message"] for word in ("Traceback", "msgspec", "Struct", "object at 0x", "NoneType"))


def test_a_stream_that_cannot_begin_is_refused_with_a_status(front: Front) -> None:
    answer = front.post(NATIVE, sampled(max_new_tokens=512) | {"stream": True})
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"


def test_an_announced_body_beyond_the_limit_is_refused_before_it_is_sent(front: Front) -> None:
    with RawConnection(front.port) as connection:
        connection.send(
            b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 200001\r\n\r\n"
        )
        status, headers, raw = connection.response()
    assert status == 413
    assert headers["connection"] == "close"
    assert json.loads(raw)["error"]["message"] == "the body has 200001 bytes, the limit is 200000 bytes"
    assert json.loads(raw)["error"]["type"] == "request_too_large"


def test_a_chunked_body_beyond_the_limit_is_refused_while_it_comes(front: Front) -> None:
    with RawConnection(front.port) as connection:
        connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"2710\r\n" + b" " * 10_000 + b"\r\n"
        for _ in range(22):
            connection.send(piece)
        status, _, raw = connection.response()
    assert status == 413
    assert json.loads(raw)["error"]["message"] == "the body has more than 200000 bytes, the limit is 200000 bytes"


def test_a_body_of_exactly_the_limit_is_read(front: Front) -> None:
    body = b'{"text": "x", "sampling_params": {"max_new_tokens": 1}}'
    with RawConnection(front.port) as connection:
        assert connection.post(NATIVE, body.ljust(200_000)).response()[0] == 200


def test_other_content_types_and_encodings_are_refused(front: Front) -> None:
    for header, told in (("Content-Type: text/plain", "text/plain"), ("Content-Encoding: gzip", "gzip")):
        with RawConnection(front.port) as connection:
            connection.send(f"POST /generate HTTP/1.1\r\nHost: t\r\n{header}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            status, _, raw = connection.response()
        assert status == 415
        assert told in json.loads(raw)["error"]["message"]


@pytest.mark.parametrize("path", ["/nowhere", "/v1/nowhere", "/generate/", "/v1/files"])
def test_unknown_routes_are_404_in_the_form_of_all_errors(front: Front, path: str) -> None:
    answer = front.get(path)
    assert answer.status == 404
    assert answer.json["error"]["code"] == "not_found"
    assert path in answer.json["error"]["message"]


def test_a_wrong_method_is_405_and_names_the_right_ones(front: Front) -> None:
    answer = front.get("/v1/completions")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.json["error"]["code"] == "method_not_allowed"
    assert set(front.get(NATIVE).headers["allow"].split(", ")) == {"POST", "PUT"}


def test_a_running_rid_cannot_be_used_again_and_an_ended_one_can(front: Front) -> None:
    with RawConnection(front.port) as connection:
        with front.behaving(held=True):
            connection.post(NATIVE, sampled(max_new_tokens=1) | {"rid": "twice"})
            front.wait_for(lambda: front.scheduler.rows)
            answer = front.post(NATIVE, {"text": "x", "rid": "twice"})
            assert answer.status == 400
            assert answer.json["error"]["code"] == "duplicate_request_id"
            assert front.post(COMPLETION, {"prompt": "x", "request_id": "twice"}).status == 400
        assert connection.response()[0] == 200
    assert front.post(NATIVE, sampled(max_new_tokens=1, stop="e") | {"rid": "twice"}).status == 200


def test_a_bug_is_answered_with_an_incident_that_the_log_has(
    front: Front, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(Streams, "open", broken)
        answer = front.post(COMPLETION, {"prompt": "x"})
    assert answer.status == 500
    assert "secret" not in answer.text
    incident = answer.json["error"]["message"].rsplit(" ", 1)[1]
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert incident in record.getMessage()
    assert record.exc_info is not None
    assert front.post(NATIVE, sampled(max_new_tokens=1)).status == 200


def test_a_failure_within_a_stream_is_one_error_event_and_done(front: Front) -> None:
    from srt.errors import ErrorCode
    from srt.messages import Failed

    with RawConnection(front.port) as connection, front.behaving(step_s=0.01):
        connection.post(NATIVE, {"text": "x", "rid": "fails", "stream": True})
        connection.until(b"data: {")
        [wire_id] = [rid for rid in front.scheduler.rows if rid.startswith("fails~")]
        front.api.send(Failed(wire_id, ErrorCode.INTERNAL, "the worker lost its mind"))
        rest = connection.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    [event] = [line for line in rest.decode().splitlines() if line.startswith('data: {"error"')]
    assert json.loads(event.removeprefix("data: ")) == {
        "error": {
            "message": "the worker lost its mind", "type": "api_error", "param": None, "code": "internal_error",
            "retryable": False,
        }
    }  # fmt: skip
    front.wait_for(lambda: not front.scheduler.rows)


def test_a_slow_body_does_not_hold_up_others(front: Front) -> None:
    with RawConnection(front.port) as slow:
        slow.send(
            b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        started = time.monotonic()
        assert front.post(NATIVE, sampled(max_new_tokens=1)).status == 200
        assert time.monotonic() - started < 2
