"""`server batch`, with a real server inside it or beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from srt.cli import main
from srt.commands.batch import read_lines, resume
from srt.errors import StartupError
from tests.support.server import Server


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def chat(number: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {number} + 1?"}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    return {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def answers(path: Path) -> dict[str, Any]:
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_every_line_is_answered_once_and_errors_are_answers_too(tmp_path: Path) -> None:
    completion = {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "1, 2,", "max_tokens": 4}}
    requests = write(tmp_path / "in.jsonl", *map(chat, range(20)), completion, chat(99, temperature=-1))
    out = tmp_path / "out.jsonl"
    with Server() as server:
        assert main(["batch", str(requests), str(out), "--url", server.url, "--concurrency", "8"]) == 1
    found = answers(out)
    assert len(out.read_text().splitlines()) == len(found) == 22
    assert found["q99"]["response"]["status_code"] == 400
    assert "temperature" in found["q99"]["response"]["body"]["error"]["message"]
    good = [line["response"] for name, line in found.items() if name != "q99"]
    assert all(response["status_code"] == 200 and response["request_id"] for response in good)
    assert found["c"]["response"]["body"]["choices"][0]["text"]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    lines = [chat(number, max_tokens=24, ignore_eos=True) for number in range(80)]
    requests, out = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "srt.cli", "batch", str(requests), str(out), "--concurrency", "4"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and len(out.read_bytes().splitlines()) >= 5):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    kept = answers_so_far = out.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert 5 <= len(answers_so_far.splitlines()) < len(lines)
    out.write_bytes(kept + b'{"id": "torn')
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    assert out.read_bytes().startswith(kept)
    assert len(out.read_text().splitlines()) == len(answers(out)) == len(lines)
    assert main(["batch", str(requests), str(out)]) == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "line 2: POST /v1/embeddings is not one of"),
        (chat(1, stream=True), "line 2: `stream` is true"),
        (chat(0), "line 2: the custom_id 'q0' has come before"),
        ({"url": "/generate", "body": {}}, "line 2: Object missing required field `custom_id`"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number_before_anything_starts(
    line: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match=complaint):
        read_lines(write(tmp_path / "in.jsonl", chat(0), line))


def test_a_file_that_holds_something_else_is_not_added_to(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("milk\nbread\n")
    with pytest.raises(StartupError, match=r"line 1 is no answer"):
        resume(notes)
    assert notes.read_text() == "milk\nbread\n"


def test_nobody_at_the_url_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write(tmp_path / "in.jsonl", chat(1))
    assert main(["batch", str(requests), str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:9"]) == 1
    assert "the server is gone" in capsys.readouterr().err


def test_requests_are_not_taken_for_their_own_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write(tmp_path / "in.jsonl", chat(1))
    before = requests.read_bytes()
    assert main(["batch", str(requests), str(tmp_path / "." / "in.jsonl")]) == 1
    assert "holds the requests; name another file for the answers" in capsys.readouterr().err
    assert requests.read_bytes() == before


def test_answers_that_cannot_be_written_are_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write(tmp_path / "in.jsonl", chat(1))
    assert main(["batch", str(requests), str(tmp_path / "missing" / "out.jsonl")]) == 1
    assert "out.jsonl: No such file or directory" in capsys.readouterr().err
