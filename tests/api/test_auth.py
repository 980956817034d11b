"""Keys: everything is closed but the signs of life, and pages that show nothing without a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from srt.api.auth import Access, Doorkeeper, Secrets, offered_keys
from srt.errors import ServingError
from tests.support.front import Front
from tests.support.raw import RawConnection
from tests.support.tokens import VOCAB_SIZE

BODY = b'{"text": "x", "sampling_params": {"max_new_tokens": 1}}'


@pytest.fixture(scope="module")
def closed(model: Path) -> Iterator[Front]:
    """A front with both keys."""
    with Front(model, vocab_size=VOCAB_SIZE, secrets=Secrets("user-key", "admin-key")) as running:
        yield running


def status(front: Front, method: str, path: str, key: str | None, body: bytes = b"") -> int:
    """Status of a request with a key."""
    header = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: t\r\n{header}Content-Length: {len(body)}\r\n\r\n"
    with RawConnection(front.port) as connection:
        return connection.send(head.encode() + body).response()[0]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/generate"), ("PUT", "/generate"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("POST", "/tokenize"), ("POST", "/v1/detokenize"),
        ("GET", "/health_generate"), ("GET", "/model_info"), ("GET", "/server_info"), ("GET", "/get_server_info"),
        ("GET", "/metrics"), ("POST", "/abort_request"), ("GET", "/flush_cache"), ("GET", "/openapi.json"),
        ("GET", "/nowhere"), ("GET", "/version"), ("GET", "/v1/loads"), ("POST", "/start_profile"),
        ("POST", "/stop_profile"), ("POST", "/v1/chat/completions/render"),
    ],
)  # fmt: skip
def test_every_route_with_something_behind_it_asks_for_a_key(closed: Front, method: str, path: str) -> None:
    assert status(closed, method, path, None) == 401
    assert status(closed, method, path, "user-keyy") == 401


def test_signs_of_life_and_empty_pages_are_open(closed: Front) -> None:
    assert status(closed, "GET", "/docs", None) == 200
    assert status(closed, "GET", "/health", None) == 200
    assert status(closed, "GET", "/ready", None) == 200


def test_the_api_key_opens_work_and_the_admin_key_everything(closed: Front) -> None:
    for key in ("user-key", "admin-key"):
        assert status(closed, "POST", "/generate", key, BODY) == 200
        assert status(closed, "GET", "/metrics", key) == 200
        assert status(closed, "POST", "/abort_request", key, b'{"rid": "x"}') == 200
    for path in ("/server_info", "/flush_cache"):
        assert status(closed, "GET", path, "user-key") == 403
        assert status(closed, "GET", path, "admin-key") == 200
    assert status(closed, "POST", "/abort_request", "user-key", b'{"abort_all": true}') == 403
    assert status(closed, "POST", "/abort_request", "admin-key", b'{"abort_all": true}') == 200


def test_a_key_may_come_as_anthropic_clients_send_it(closed: Front) -> None:
    for headers, expected in (
        ("X-Api-Key: user-key", 200),
        ("X-Api-Key: wrong", 401),
        ("Authorization: Basic user-key", 401),
        ("Authorization: Bearer wrong\r\nX-Api-Key: user-key", 200),
    ):
        with RawConnection(closed.port) as connection:
            connection.send(f"GET /v1/models HTTP/1.1\r\nHost: t\r\n{headers}\r\n\r\n".encode())
            assert connection.response()[0] == expected, headers


def test_no_key_is_shown_anywhere(closed: Front) -> None:
    with RawConnection(closed.port) as connection:
        connection.send(b"GET /server_info HTTP/1.1\r\nHost: t\r\nAuthorization: bearer admin-key\r\n\r\n")
        code, _, body = connection.response()
    assert code == 200
    assert b"-key" not in body
    assert "-key" not in repr(closed.secrets)


@pytest.mark.parametrize(
    ("secrets", "access", "key", "expected"),
    [
        (Secrets(), Access.ADMIN, None, 200),
        (Secrets(api_key="u"), Access.ADMIN, "u", 200),
        (Secrets(api_key="u"), Access.ADMIN, None, 401),
        (Secrets(admin_api_key="a"), Access.KEY, None, 200),
        (Secrets(admin_api_key="a"), Access.ADMIN, None, 403),
        (Secrets(admin_api_key="a"), Access.ADMIN, "b", 401),
        (Secrets(admin_api_key="a"), Access.ADMIN, "a", 200),
        (Secrets(api_key="ü"), Access.KEY, "ü", 200),
    ],
)
def test_with_one_key_the_other_door_stays_as_it_is(
    secrets: Secrets, access: Access, key: str | None, expected: int
) -> None:
    headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
    try:
        Doorkeeper(secrets).check(access, offered_keys(headers))
        found = 200
    except ServingError as error:
        found = error.status
    assert found == expected
