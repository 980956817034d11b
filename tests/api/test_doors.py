"""Around the routes: pages of other origins, HTTPS, silent streams, too many connections."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import pytest
import trustme

from srt.api.tls import tls_context
from srt.configs.server import ServerConfig
from srt.errors import StartupError
from tests.support.front import Front
from tests.support.raw import RawConnection
from tests.support.tokens import VOCAB_SIZE

PAGE = "https://chat.example"
BODY = b'{"text": "x", "sampling_params": {"max_new_tokens": 1}}'


def ask(front: Front, method: str, headers: str, body: bytes = b"") -> tuple[int, dict[str, str]]:
    """Status and headers of the answer to a request of a page."""
    head = f"{method} /generate HTTP/1.1\r\nHost: t:1\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    with RawConnection(front.port) as connection:
        status, found, _ = connection.send(head.encode() + body).response()
    return status, found


def test_a_page_of_another_origin_is_refused_before_anything_is_done_for_it(front: Front) -> None:
    admitted = len(front.scheduler.admitted)
    status, headers = ask(front, "POST", f"Origin: {PAGE}\r\n", BODY)
    assert status == 403
    assert "access-control-allow-origin" not in headers
    preflight = f"Origin: {PAGE}\r\nAccess-Control-Request-Method: POST\r\n"
    assert ask(front, "OPTIONS", preflight)[0] == 403
    assert len(front.scheduler.admitted) == admitted


def test_the_servers_own_page_may_ask(front: Front) -> None:
    assert ask(front, "POST", "Origin: http://t:1\r\n", BODY)[0] == 200


@pytest.mark.parametrize(("allowed", "told"), [(f"http://a.example, {PAGE}/", PAGE), ("*", "*")])
def test_a_listed_page_may_ask_after_its_browser_has_asked(model: Path, allowed: str, told: str) -> None:
    with Front(model, vocab_size=VOCAB_SIZE, allowed_origins=allowed) as front:
        preflight = f"Origin: {PAGE}\r\nAccess-Control-Request-Method: POST\r\n"
        status, headers = ask(front, "OPTIONS", preflight + "Access-Control-Request-Headers: x-api-key\r\n")
        assert (status, headers["access-control-allow-origin"]) == (200, told)
        assert headers["access-control-allow-headers"] == "x-api-key"
        status, headers = ask(front, "POST", f"Origin: {PAGE}\r\n", BODY)
        assert (status, headers["access-control-allow-origin"], headers["vary"]) == (200, told, "Origin")
        if allowed != "*":
            assert ask(front, "POST", "Origin: https://chat.example.evil\r\n", BODY)[0] == 403


def test_https_is_spoken_with_the_given_certificate_and_nothing_else(model: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    context = ssl.create_default_context()
    authority.configure_trust(context)
    front = Front(model, vocab_size=VOCAB_SIZE, ssl_certfile=str(chain), ssl_keyfile=str(key)).start()
    plain = socket.create_connection(("127.0.0.1", front.port), timeout=10)
    with context.wrap_socket(plain, server_hostname="localhost") as secure:
        secure.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert secure.recv(1024).startswith(b"HTTP/1.1 200 OK")
    with RawConnection(front.port) as plain_peer:
        plain_peer.send(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        with pytest.raises((AssertionError, OSError)):
            plain_peer.response()
    front.finish()


def test_a_certificate_that_is_not_usable_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    alone = tmp_path / "alone.pem"
    alone.write_bytes(certificate.cert_chain_pems[0].bytes())
    whole = tmp_path / "whole.pem"
    whole.write_bytes(certificate.private_key_and_cert_chain_pem.bytes())
    assert tls_context(ServerConfig()) is None
    assert tls_context(ServerConfig(ssl_certfile=str(whole))) is not None
    for config, sentence in (
        (ServerConfig(ssl_certfile=str(alone)), "alone.pem"),
        (ServerConfig(ssl_certfile="/nowhere.pem"), "No such file"),
        (ServerConfig(ssl_keyfile=str(whole)), "needs --ssl-certfile"),
    ):
        with pytest.raises(StartupError, match=sentence):
            tls_context(config)


@pytest.mark.parametrize(("seconds", "expected"), [(0.05, True), (0.0, False)])
def test_a_silent_stream_gets_comments_only_if_the_operator_wants_them(
    model: Path, seconds: float, expected: bool
) -> None:
    body = {"text": "x", "stream": True, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
    with (
        Front(model, vocab_size=VOCAB_SIZE, sse_keepalive_seconds=seconds) as front,
        front.behaving(step_s=0.2),
        RawConnection(front.port) as connection,
    ):
        everything = connection.post("/generate", body).until(b"data: [DONE]")
    assert (b": keep-alive\n\n" in everything) == expected
    assert everything.count(b"data: {") == 2


def test_above_the_limit_an_idle_connection_makes_room_and_a_busy_one_does_not(model: Path) -> None:
    with Front(model, vocab_size=VOCAB_SIZE, max_connections=2) as front:
        with front.behaving(held=True), RawConnection(front.port) as one, RawConnection(front.port) as two:
            one.post("/generate", {"text": "x"})
            two.post("/generate", {"text": "x"})
            front.wait_for(lambda: len(front.scheduler.rows) == 2)
            with RawConnection(front.port) as three:
                status, headers, body = three.response()
                assert (status, headers["connection"]) == (503, "close")
                assert b"2 connections are open" in body
        front.wait_for(lambda: not front.scheduler.rows)
        time.sleep(0.05)
        idle = [RawConnection(front.port) for _ in range(2)]
        time.sleep(0.05)
        assert front.get("/health").status == 200
        assert idle[0].socket.recv(10) == b"", "the longest idle one was closed"
        for connection in idle:
            connection.socket.close()
