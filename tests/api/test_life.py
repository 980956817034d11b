"""Clients that leave, clients that do not read, servers that load, drain and lose processes."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import srt.api.control
import srt.api.process
import srt.api.streams
from srt.errors import StartupError
from srt.heartbeat import STEP_STARTED, Board, Heartbeat
from tests.support.front import ROLES, Front
from tests.support.raw import RawConnection
from tests.support.tokens import VOCAB_SIZE

LONG: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}


def cancelled(front: Front) -> float:
    """Requests that ended because their client left."""
    return front.metric("requests_cancelled_total")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_client_that_leaves_ends_its_request_at_once(front: Front, path: str, stream: bool, held: bool) -> None:
    bodies = {
        "/generate": LONG,
        "/v1/completions": {"prompt": [5, 6], "max_tokens": 400, "stop": ["never"]},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400},
    }
    before = cancelled(front)
    with front.behaving(step_s=0.01, held=held):
        connection = RawConnection(front.port).post(path, bodies[path] | {"stream": stream})
        front.wait_for(lambda: front.scheduler.rows)
        if stream and not held:
            connection.until(b"data: {")
        connection.vanish()
        left = time.monotonic()
        front.wait_for(lambda: front.scheduler.aborted[-1:] and not front.scheduler.rows)
        assert time.monotonic() - left < 1
    assert cancelled(front) == before + 1
    assert front.metric("http_responses_total", endpoint=path, status_code="499") >= 1
    assert front.metric("http_requests_active") == 1, "the scrape itself"


def test_a_client_that_closes_politely_ends_its_batch(front: Front) -> None:
    with front.behaving(held=True):
        with RawConnection(front.port) as connection:
            connection.post("/generate", {"input_ids": [[5], [6], [7]], "stream": True})
            front.wait_for(lambda: len(front.scheduler.rows) == 3)
        front.wait_for(lambda: not front.scheduler.rows)


def test_a_client_that_does_not_read_stalls_nobody_and_gets_everything_later(front: Front) -> None:
    body = LONG | {"stream": True, "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
    # Cumulative events of 500 tokens are far more than the buffers of a connection that asks for small ones.
    with RawConnection(front.port) as slow:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.post("/generate", body)
        whole = front.post("/generate", body | {"stream": False}).json
        front.wait_for(lambda: not front.scheduler.rows)
        text = slow.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    last = [line for line in text.decode().splitlines() if line.startswith("data: {")][-1]
    assert json.loads(last.removeprefix("data: "))["output_ids"] == whole["output_ids"]


def test_a_client_that_stopped_reading_for_good_is_dropped(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(srt.api.streams, "STALL_S", 0.3)
    prompts = [[5, 6, 7]] * 40
    with RawConnection(front.port) as dead:
        dead.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with front.behaving(step_s=0.02):
            params = {"max_new_tokens": 500, "ignore_eos": True}
            dead.post("/generate", {"input_ids": prompts, "sampling_params": params, "stream": True})
            front.wait_for(lambda: len(front.scheduler.rows) == 40)
            front.wait_for(lambda: not front.scheduler.rows, timeout_s=8)
    front.wait_for(lambda: front.metric("http_requests_active") == 1)


def test_an_aborted_request_closes_with_what_it_has_and_its_namesakes_live(front: Front) -> None:
    answers: dict[str, Any] = {}

    def ask(rid: str) -> None:
        answers[rid] = front.post("/generate", LONG | {"rid": rid})

    with front.behaving(step_s=0.005):
        threads = [threading.Thread(target=ask, args=(rid,)) for rid in ("job1", "job10")]
        for thread in threads:
            thread.start()
        front.wait_for(lambda: len(front.scheduler.rows) == 2)
        time.sleep(0.05)
        assert front.post("/abort_request", {"rid": "job"}).status == 200
        assert front.post("/abort_request", {"rid": "job1", "abort_message": "enough"}).status == 200
        threads[0].join(5)
        assert not threads[0].is_alive()
    threads[1].join(10)
    aborted = answers["job1"].json
    reason = {"type": "abort", "message": "enough", "status_code": None, "err_type": None}
    assert aborted["meta_info"]["finish_reason"] == reason
    assert 0 < aborted["meta_info"]["completion_tokens"] < 400
    assert len(answers["job10"].json["output_ids"]) == 400


def test_a_call_is_aborted_by_the_id_in_its_answer_and_a_batch_by_its_name(front: Front) -> None:
    with front.behaving(held=True), RawConnection(front.port) as batch:
        batch.post("/generate", {"text": ["a", "b"], "rid": "many"})
        front.wait_for(lambda: len(front.scheduler.rows) == 2)
        front.post("/abort_request", {"rid": "many"})
        items = json.loads(batch.response()[2])
    assert [item["meta_info"]["finish_reason"]["type"] for item in items] == ["abort", "abort"]
    body = {"prompt": [5], "max_tokens": 400, "stream": True}
    with front.behaving(step_s=0.01), RawConnection(front.port) as connection:
        connection.post("/v1/completions", body)
        first = connection.until(b"\n\n")
        name = json.loads(first[first.index(b"data: ") + 6 :])["id"]
        front.post("/abort_request", {"rid": name})
        rest = connection.until(b"data: [DONE]")
    assert b'"finish_reason":"abort"' in rest


def test_abort_all_ends_everything(front: Front) -> None:
    with front.behaving(held=True), RawConnection(front.port) as connection:
        connection.post("/generate", LONG)
        front.wait_for(lambda: front.scheduler.rows)
        assert front.post("/abort_request", {"abort_all": True}).status == 200
        assert json.loads(connection.response()[2])["meta_info"]["finish_reason"]["type"] == "abort"


def test_flushing_is_refused_while_requests_run_and_can_wait_for_their_end(front: Front) -> None:
    flushed = front.scheduler.flushed
    with RawConnection(front.port) as connection:
        with front.behaving(held=True):
            connection.post("/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}})
            front.wait_for(lambda: front.scheduler.rows)
            refused = front.post("/flush_cache")
            assert (refused.status, refused.headers["content-type"]) == (400, "text/plain; charset=utf-8")
            assert front.scheduler.flushed == flushed
            threading.Timer(0.2, lambda: setattr(front.scheduler.behaviour, "held", False)).start()
            assert front.get("/flush_cache?timeout=5").status == 200
        connection.response()
    assert front.scheduler.flushed == flushed + 1
    assert front.get("/flush_cache?timeout=soon").status == 400


def test_health_names_the_processes_that_are_late_and_recovers(front: Front) -> None:
    assert front.get("/health").json["late"] == []
    worker = front.board.slot("srt:worker[0]")
    worker[STEP_STARTED] = time.monotonic_ns() - int(30e9)
    assert front.get("/health").status == 200, "a long step is no fault"
    worker[STEP_STARTED] = time.monotonic_ns() - int(301e9)
    late = front.get("/health")
    assert (late.status, late.json["late"]) == (503, ["srt:worker[0]"])
    assert front.get("/ready").status == 503
    assert front.metric("scheduler_step_age_seconds", process="srt:worker[0]") > 300
    worker[STEP_STARTED] = 0
    assert front.get("/health").status == 200


def test_health_generate_makes_one_token_and_gives_up_in_time(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    assert front.get("/health_generate").status == 200
    assert front.scheduler.admitted[-1].stop.max_new_tokens == 1
    monkeypatch.setattr(srt.api.control, "HEALTH_GENERATE_S", 0.2)
    with front.behaving(held=True):
        assert front.get("/health_generate").status == 503
        front.wait_for(lambda: not front.scheduler.rows)


def test_a_server_is_closed_while_it_loads_and_while_it_drains(model: Path) -> None:
    front = Front(model, vocab_size=VOCAB_SIZE, drain_timeout=20.0).start()
    body = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
    for path in ("/generate", "/tokenize", "/health_generate"):
        answer = front.request("GET" if "health" in path else "POST", path, None if "health" in path else body)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "loading" in answer.json["error"]["message"]
    assert front.get("/ready").json == {"ready": False, "state": "loading", "late": []}
    assert front.get("/health").status == 200
    front.open()
    with RawConnection(front.port) as running:
        front.scheduler.behaviour.step_s = 0.003
        running.post("/generate", LONG | {"stream": True})
        running.until(b"data: {")
        front.beats["srt:api"].stop()
        front.wait_for(lambda: front.get("/ready").status == 503)
        refused = front.post("/generate", body)
        assert (refused.status, refused.json["error"]["message"]) == (503, "the server is draining")
        assert b'"completion_tokens":400' in running.until(b"[DONE]")
    front.threads["api"].join(5)
    assert not front.threads["api"].is_alive()
    front.finish()


def test_a_drain_that_takes_too_long_aborts_the_rest(model: Path) -> None:
    front = Front(model, vocab_size=VOCAB_SIZE, drain_timeout=0.3).start().open()
    front.scheduler.behaviour.step_s = 0.02
    with RawConnection(front.port) as streamed, RawConnection(front.port) as whole:
        streamed.post("/generate", LONG | {"stream": True})
        whole.post("/generate", LONG)
        streamed.until(b"data: {")
        front.beats["srt:api"].stop()
        rest = streamed.until(b"[DONE]")
        assert b'"finish_reason":{"type":"abort","message":"the server is shutting down"' in rest
        assert json.loads(whole.response()[2])["meta_info"]["finish_reason"]["type"] == "abort"
    front.wait_for(lambda: not front.scheduler.rows)
    front.finish()


def test_a_taken_port_is_one_sentence(tmp_path: Path, front: Front) -> None:
    Board.create(tmp_path, ROLES)
    with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1:{front.port}: Address already in use"):
        srt.api.process.run(front.plan, tmp_path, 0, Heartbeat.detached())
