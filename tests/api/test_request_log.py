"""Request lines: no more than the level allows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from srt.log import REQUESTS
from tests.support.front import Front
from tests.support.tokens import VOCAB_SIZE


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_request_leaves_one_line_when_it_comes_and_one_when_it_ends(
    model: Path, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    caplog.set_level(logging.INFO, REQUESTS)
    options: dict[str, Any] = {"log_requests": True, "log_requests_level": level, "log_requests_format": "json"}
    with Front(model, vocab_size=VOCAB_SIZE, **options) as front:
        body = {"text": "a secret", "rid": "mine", "sampling_params": {"max_new_tokens": 3, "top_k": 7}}
        assert front.post("/generate", body).status == 200
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == REQUESTS]
    came, ended = lines
    assert (came["event"], came["rid"], ended["event"], ended["rid"]) == ("received", "mine", "ended", "mine")
    assert (ended["finish"], ended["completion_tokens"], ended["client_gone"]) == ("length", 3, False)
    assert ended["seconds"] > 0
    assert ("top_k" in came) == (level >= 1)
    assert ("a secret" in json.dumps(lines)) == (level >= 2)


def test_what_is_refused_leaves_a_line_without_its_body(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, REQUESTS)
    options: dict[str, Any] = {"log_requests": True, "log_requests_level": 0, "log_requests_format": "json"}
    with Front(model, vocab_size=VOCAB_SIZE, **options) as front:
        answer = front.post("/generate", {"text": "a secret", "sampling_params": {"top_p": 7}})
    [line] = [json.loads(record.getMessage()) for record in caplog.records if record.name == REQUESTS]
    assert (line["event"], line["status"], line["path"]) == ("refused", 400, "/generate")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in json.dumps(line)
