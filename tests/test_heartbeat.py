"""The board of heartbeats."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srt.heartbeat import BEAT, PID, Board, Heartbeat, process_name

BEATING = """
import sys, time
from pathlib import Path
from srt.heartbeat import Board, Heartbeat
board = Board.open(Path(sys.argv[1]))
beat = Heartbeat(board.slot("srt:worker[0]"))
beat.step_begins(7)
beat = Heartbeat.attach(board, "srt:worker[0]")
time.sleep(60)
"""


def test_names_are_the_titles_of_the_processes() -> None:
    assert [process_name("api"), process_name("worker", 3)] == ["srt:api", "srt:worker[3]"]


def test_a_process_that_never_beat_is_late(tmp_path: Path) -> None:
    board = Board.create(tmp_path, ["srt:launch", "srt:api"])
    heartbeat = Heartbeat.attach(board, "srt:launch")
    assert board.late() == ["srt:api"]
    assert board.ages()[1].beat_s is None
    heartbeat.close()


def test_a_beat_that_is_too_old_is_late_and_a_new_one_is_not(tmp_path: Path) -> None:
    board = Board.create(tmp_path, ["srt:api"])
    slot = board.slot("srt:api")
    slot[BEAT] = time.monotonic_ns() - 4_000_000_000
    assert board.late(3.0) == ["srt:api"]
    assert board.late(5.0) == []
    slot[BEAT] = time.monotonic_ns()
    assert board.late(3.0) == []


def test_the_step_has_an_age_only_while_it_runs(tmp_path: Path) -> None:
    board = Board.create(tmp_path, ["srt:scheduler"])
    heartbeat = Heartbeat.attach(board, "srt:scheduler")
    assert board.ages()[0].step_s is None
    heartbeat.step_begins(12)
    time.sleep(0.02)
    age = board.ages()[0]
    assert (age.step, age.pid) == (12, os.getpid())
    assert age.step_s is not None and 0.02 <= age.step_s < 1
    heartbeat.step_ended()
    assert board.ages()[0].step_s is None
    heartbeat.close()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="srt:nobody"):
        Board.create(tmp_path, ["srt:api"]).slot("srt:nobody")


def test_detached_signs_can_be_written_and_stopped() -> None:
    heartbeat = Heartbeat.detached()
    heartbeat.step_begins(1)
    heartbeat.step_ended()
    assert not heartbeat.stopping
    heartbeat.stop()
    assert heartbeat.stopping


def test_a_stopped_process_turns_late_and_recovers(tmp_path: Path) -> None:
    board = Board.create(tmp_path, ["srt:worker[0]"])
    with subprocess.Popen([sys.executable, "-c", BEATING, str(tmp_path)]) as child:
        try:
            wait_until(board, late=False)
            assert board.slot("srt:worker[0]")[PID] == child.pid
            os.kill(child.pid, signal.SIGSTOP)
            begun = time.monotonic()
            wait_until(board, late=True)
            assert time.monotonic() - begun < 5
            assert board.ages()[0].step == 7
            os.kill(child.pid, signal.SIGCONT)
            wait_until(board, late=False)
        finally:
            child.kill()


def wait_until(board: Board, *, late: bool) -> None:
    """Fails after 30 s."""
    deadline = time.monotonic() + 30
    while bool(board.late()) != late:
        assert time.monotonic() < deadline
        time.sleep(0.02)
