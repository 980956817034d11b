"""How the Responses and the Messages API tell of what goes wrong, and when a call is over."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from srt.api.auth import Secrets
from tests.support.front import Front
from tests.support.raw import RawConnection
from tests.support.tokens import VOCAB_SIZE

MESSAGES: dict[str, Any] = {"model": "default", "max_tokens": 400, "messages": [{"role": "user", "content": "x"}]}
RESPONSES: dict[str, Any] = {"model": "default", "max_output_tokens": 400, "input": "x"}


def last_event(text: bytes) -> Any:
    """Data of the last event of a stream."""
    return json.loads([line for line in text.decode().splitlines() if line.startswith("data: ")][-1][6:])


def test_an_aborted_call_is_an_error_in_the_words_of_its_api(front: Front) -> None:
    for path, body, mark in (
        ("/v1/messages", MESSAGES, b"event: error\n"),
        ("/v1/responses", RESPONSES, b"event: response.failed\n"),
    ):
        with front.behaving(step_s=0.01), RawConnection(front.port) as peer:
            peer.post(path, body | {"stream": True})
            peer.until(b"delta")
            front.post("/abort_request", {"abort_all": True})
            peer.until(mark)
            failed = last_event(peer.until(b"\n\n"))
        told = failed["error"] if path == "/v1/messages" else failed["response"]["error"]
        assert "abort" in told["message"]
        whole: list[Any] = []
        with front.behaving(held=True):
            asking = threading.Thread(target=lambda: whole.append(front.post(path, body)))  # noqa: B023
            asking.start()
            front.wait_for(lambda: front.scheduler.rows)
            front.post("/abort_request", {"abort_all": True})
            asking.join(10)
        assert whole[0].status == 499


def test_errors_before_the_route_have_its_form_too(model: Path) -> None:
    with Front(model, vocab_size=VOCAB_SIZE, secrets=Secrets("key")) as front:
        denied = front.post("/v1/messages", MESSAGES)
        assert (denied.status, denied.json["type"], denied.json["error"]["type"]) == (
            401,
            "error",
            "authentication_error",
        )
        assert denied.headers["request-id"] == denied.headers["x-request-id"]
        assert front.post("/v1/responses", RESPONSES).json["error"]["code"] == "invalid_api_key"


def test_a_full_queue_is_told_as_clients_of_each_api_retry_it(front: Front) -> None:
    with front.behaving(held=True, max_live=0):
        for path, body in (("/v1/messages", MESSAGES), ("/v1/responses", RESPONSES)):
            full = front.post(path, body)
            assert (full.status, full.headers["retry-after"]) == (429, "1")
            assert full.json["error"]["type"] == "rate_limit_error"


def test_what_is_not_honoured_is_told_or_refused(front: Front) -> None:
    noted = front.post("/v1/messages", MESSAGES | {"max_tokens": 1, "metadata": {"user_id": "u"}, "odd": 1}).json
    assert noted["warnings"] == ["field 'metadata' has no effect: not kept", "unknown field 'odd' was ignored"]
    noted = front.post("/v1/responses", RESPONSES | {"max_output_tokens": 1, "max_tool_calls": 3}).json
    assert noted["warnings"] == ["field 'max_tool_calls' has no effect: only for tools that a server runs"]
    for path, body, field in (
        ("/v1/messages", MESSAGES | {"container": "x"}, "container"),
        ("/v1/messages", MESSAGES | {"stop_sequences": [""]}, "stop_sequences[0]"),
        ("/v1/responses", RESPONSES | {"conversation": "x"}, "conversation"),
        ("/v1/responses", RESPONSES | {"max_output_tokens": 0}, "max_output_tokens"),
    ):
        refused = front.post(path, body)
        assert refused.status == 400
        assert f"'{field}'" in refused.json["error"]["message"]


def test_a_server_that_keeps_no_responses_says_so(model: Path) -> None:
    with Front(model, vocab_size=VOCAB_SIZE, response_store_bytes=0) as front:
        made = front.post("/v1/responses", RESPONSES | {"max_output_tokens": 1}).json
        assert made["store"] is False
        assert front.get(f"/v1/responses/{made['id']}").status == 404


def test_integers_of_any_size_are_taken_or_refused_in_words(front: Front) -> None:
    """Chat completions take them in schemas and arguments, so the APIs that are translated into them must, too."""
    huge = 10**30
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": huge}}}
    called = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": huge}}
    messages = [*MESSAGES["messages"], {"role": "assistant", "content": [called]}, {"role": "user", "content": "y"}]
    few = {"max_tokens": 2, "tools": [{"name": "add", "input_schema": schema}]}
    assert front.post("/v1/messages", MESSAGES | few | {"messages": messages}).status == 200
    function = {"type": "function", "name": "add", "parameters": schema}
    body = RESPONSES | {"max_output_tokens": 2, "tools": [function]}
    for stream in (False, True):
        answered = front.post("/v1/responses", body | {"stream": stream})
        assert answered.status == 200
        assert b'"maximum":%d' % huge in answered.body
    kept = front.post("/v1/responses", body | {"input": [{"role": "user", "content": "x", "mark": huge}]}).json
    assert front.get(f"/v1/responses/{kept['id']}/input_items").json["data"][0]["mark"] == huge
    for path, fields in (
        ("/v1/messages", MESSAGES | {"top_k": huge}),
        ("/v1/responses", RESPONSES | {"max_output_tokens": huge}),
    ):
        refused = front.post(path, fields)
        assert (refused.status, str(huge) in refused.json["error"]["message"]) == (400, True)


def test_a_page_of_input_items_has_a_number_of_items(front: Front) -> None:
    kept = front.post("/v1/responses", RESPONSES | {"max_output_tokens": 2}).json
    for limit in ("0", "101", "-1", "1.5", "%C2%B2", "9" * 5000):
        refused = front.get(f"/v1/responses/{kept['id']}/input_items?limit={limit}")
        assert (refused.status, refused.json["error"]["param"]) == (400, "limit")
