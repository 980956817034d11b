"""What happens below the application: heads without end, requests that never become whole, what is not HTTP."""

from __future__ import annotations

import json

import pytest

from srt.api import connection
from tests.support.front import Front
from tests.support.raw import RawConnection

HEAD = b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
BODY = b'{"text": "x", "sampling_params": {"max_new_tokens": 1}}'


def closed(peer: RawConnection) -> bool:
    """Whether the server has closed, after everything that it still had to say."""
    while data := peer.socket.recv(65536):
        peer.received += data
    return True


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % index for index in range(129)) + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: " + b"a" * 1_000_000,
    ],
    ids=["one field", "many fields", "path", "no end"],
)
def test_a_head_beyond_the_limits_is_refused_with_both_numbers(front: Front, head: bytes) -> None:
    with RawConnection(front.port) as peer:
        peer.send(head)
        status, headers, raw = peer.response()
    assert (status, headers["connection"]) == (431, "close")
    error = json.loads(raw)["error"]
    assert error["type"] == "request_too_large"
    assert "the limits are 65536 bytes and 128 fields" in error["message"]
    assert front.get("/health").status == 200


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00", b"BREW / HTTP/1.1\r\n\r\n", HEAD + b"Content-Length: x\r\n\r\n"]
)
def test_what_is_not_http_is_refused_in_the_form_of_all_errors(front: Front, sent: bytes) -> None:
    with RawConnection(front.port) as peer:
        status, headers, raw = peer.send(sent).response()
        assert closed(peer)
    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(raw)["error"]["code"] == "invalid_request"


def test_a_request_that_never_becomes_whole_is_dropped(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    monkeypatch.setattr(connection, "BODY_STALL_S", 0.3)
    with RawConnection(front.port) as silent, RawConnection(front.port) as head, RawConnection(front.port) as body:
        head.send(HEAD)
        body.send(HEAD + b"Content-Length: 100\r\n\r\n{")
        for peer, part in ((head, "head"), (body, "body")):
            status, _, raw = peer.response()
            assert status == 408
            assert f"the rest of the request's {part} did not come in 0.3 s" in json.loads(raw)["error"]["message"]
            assert closed(peer)
        assert closed(silent)
        assert silent.received == b""
    front.wait_for(lambda: front.metric("http_requests_active") == 1)


def test_a_long_answer_and_an_idle_connection_are_not_overdue(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    monkeypatch.setattr(connection, "BODY_STALL_S", 0.3)
    with RawConnection(front.port) as peer:
        with front.behaving(step_s=0.05):
            body = {"text": "x", "sampling_params": {"max_new_tokens": 20, "ignore_eos": True}}
            assert peer.post("/generate", body).send(b"POST /gen").response()[0] == 200
        # The head that was begun is overdue now, but its connection had an answer to wait for until a moment ago.
        peer.send(HEAD.removeprefix(b"POST /gen") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        assert peer.response()[0] == 200


def test_requests_in_one_segment_are_answered_in_order(front: Front) -> None:
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    with RawConnection(front.port) as peer:
        peer.send(whole + b"GET /nowhere HTTP/1.1\r\n\r\n" + whole)
        assert [peer.response()[0] for _ in range(3)] == [200, 404, 200]


def test_an_upgrade_is_answered_as_a_plain_request_and_nothing_follows_it(front: Front) -> None:
    with RawConnection(front.port) as peer:
        peer.send(b"GET /health HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        status, headers, _ = peer.response()
        assert closed(peer)
    assert (status, headers["connection"]) == (200, "close")


def test_a_body_that_breaks_off_asks_for_nothing(front: Front) -> None:
    admitted = len(front.scheduler.admitted)
    with RawConnection(front.port) as peer:
        peer.send(HEAD + b"Content-Length: 1000\r\n\r\n" + BODY)
    front.wait_for(lambda: 'method="POST",model_name="test-model",status_code="499"' in front.get("/metrics").text)
    assert len(front.scheduler.admitted) == admitted
