"""`server chat`, talking with a real server."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pictures import file_of
from tests.support.pictures import picture as made_picture
from tests.support.server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def talk(server: Server, *lines: str, options: tuple[str, ...] = ("--temperature", "0")) -> tuple[int, str]:
    """What a conversation prints when its lines come from a pipe, and its exit status."""
    command = [sys.executable, "-m", "srt.cli", "chat", "--url", server.url, *options]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_answers_come_with_what_they_cost_and_earlier_turns_are_remembered(server: Server) -> None:
    status, shown = talk(server, "What is 3 + 4?", "What is 5 + 6?")
    assert status == 0
    assert "7" in shown
    assert "11" in shown
    costs = [line for line in shown.splitlines() if "tokens/s" in line]
    assert len(costs) == 2
    assert " 0 of " not in costs[1], "the second turn repeats the first one's prompt, which is cached"


def test_an_image_goes_with_the_next_message(server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(file_of(made_picture(64, 64)))
    status, shown = talk(server, f"/image {picture}", "What is this?", "/image nowhere.png")
    assert status == 0
    assert "picture.png goes with the next message" in shown
    assert "nowhere.png: No such file" in shown


def test_errors_of_the_server_are_shown_and_the_conversation_goes_on(server: Server) -> None:
    status, shown = talk(server, "hello", "/nonsense", options=("--temperature", "-3"))
    assert status == 1
    assert "error: 'temperature' is -3.0" in shown
    assert "there is no /nonsense" in shown


def test_on_a_terminal_ctrl_c_stops_the_answer_and_not_the_conversation(server: Server) -> None:
    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "srt.cli", "chat", "--url", server.url, "--temperature", "0"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    shown = b""

    def until(wanted: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while wanted not in shown:
            assert time.monotonic() < deadline, shown
            shown += os.read(main_end, 65536)

    until(b"/help says")
    os.write(main_end, b"Count from 100 to 299.\n")
    until(b" 103 ")
    process.send_signal(signal.SIGINT)
    until(b"stopped")
    os.write(main_end, b"/help\n")
    until(b"Ctrl-C stops an answer")
    os.write(main_end, b"/quit\n")
    assert process.wait(30) == 0
    os.close(main_end)
    assert b" 298 " not in shown
