"""Copies of a process that do a share of its work each."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from srt.copies import Copies, CopyError

PARENT = """
import os, time
from srt.copies import Copies

copies = Copies(2, "srt:test copies", 60, lambda: time.sleep(600) or b"")
print(*copies.pids, flush=True)
os.kill(os.getpid(), 9)
"""


def running(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def turn() -> Iterator[Callable[[], int]]:
    """Called in copies: 0 in the first to call it, then 1, 2."""
    reading, writing = os.pipe()
    os.write(writing, bytes(range(3)))
    os.close(writing)
    yield lambda: os.read(reading, 1)[0]
    os.close(reading)


def hang() -> bytes:
    time.sleep(600)
    return b""


def texts(copies: Copies) -> list[str]:
    """What became of copies, none of which answered."""
    outcomes = copies.outcomes()
    assert all(isinstance(outcome, CopyError) for outcome in outcomes), outcomes
    return [str(outcome) for outcome in outcomes]


def test_each_copy_does_its_share_and_answers(turn: Callable[[], int]) -> None:
    mine, before = os.getpid(), descriptors()

    def work() -> bytes:
        assert os.getpid() != mine
        number = turn()
        return bytes([number]) * (200_000 + number)  # more than a pipe holds

    copies = Copies(3, "srt:test copies", 30, work)
    outcomes = copies.outcomes()
    assert all(isinstance(outcome, bytes) for outcome in outcomes), outcomes
    assert set(outcomes) == {bytes([number]) * (200_000 + number) for number in range(3)}
    assert copies.pids == [] and descriptors() == before


def test_what_fails_in_a_copy_is_told_beside_what_others_answer(turn: Callable[[], int]) -> None:
    def work() -> bytes:
        if turn() == 0:
            raise ValueError("no such kernel")
        time.sleep(0.5)
        return b"done"

    failed, done = Copies(2, "srt:test copies", None, work).outcomes()
    assert isinstance(failed, CopyError) and str(failed).endswith("ValueError: no such kernel") and failed.code == 1
    assert done == b"done"


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGRTMIN + 2), f"ended by signal {signal.SIGRTMIN + 2}"),
        (lambda: ctypes.CDLL(None).exit(1), "ended by status 1"),
    ],
    ids=["killed", "an unnamed signal", "left by a library"],
)
def test_a_copy_that_ends_without_an_answer_is_told(end: object, told: str) -> None:
    def work() -> bytes:
        assert callable(end)
        end()
        return b""

    (text,) = texts(Copies(1, "srt:test copies", 30, work))
    assert text.endswith(told)


def test_a_copy_that_cannot_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(title: str) -> None:
        raise OSError("no titles")

    monkeypatch.setattr("setproctitle.setproctitle", refuse)
    assert texts(Copies(1, "srt:test copies", 30, hang)) == ["srt:test copies ended by status 1"]


def test_copies_that_hang_are_ended_when_their_time_is_over_and_others_are_heard(turn: Callable[[], int]) -> None:
    copies = Copies(3, "srt:test copies", 0.5, lambda: b"done" if turn() == 1 else hang())
    pids = copies.pids
    done, *others = copies.outcomes()
    assert done == b"done" and [str(other) for other in others] == ["srt:test copies took too long"] * 2
    assert not any(running(pid) for pid in pids)


def test_a_copy_ends_by_the_signal_that_its_process_handles_and_not_by_that_of_a_terminal() -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    try:
        copies = Copies(2, "srt:test copies", 30, hang)
    finally:
        signal.signal(signal.SIGTERM, before)
    one, other = copies.pids
    for pid in (one, other):
        while Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") != b"srt:test copies":
            time.sleep(0.01)  # until it has its own handlers
    os.kill(one, signal.SIGTERM)
    os.kill(other, signal.SIGINT)
    time.sleep(0.3)
    assert running(other)
    os.kill(other, signal.SIGKILL)
    assert set(texts(copies)) == {"srt:test copies ended by SIGTERM", "srt:test copies ended by SIGKILL"}
    assert not handled


def refusing_after(forks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many forks succeed."""
    fork, left = os.fork, [None] * forks

    def limited() -> int:
        if not left:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        left.pop()
        return fork()

    monkeypatch.setattr(os, "fork", limited)


def test_a_process_that_cannot_be_copied_says_so_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_after(0, monkeypatch)
    before = descriptors()
    told = "this process cannot be copied: Resource temporarily unavailable"
    assert texts(Copies(2, "srt:test copies", 30, hang)) == [told]
    assert descriptors() == before


def test_where_there_cannot_be_all_copies_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_after(2, monkeypatch)
    before = descriptors()
    assert Copies(3, "srt:test copies", 30, lambda: b"done").outcomes() == [b"done", b"done"]
    assert descriptors() == before


def test_copies_die_with_the_process_that_made_them() -> None:
    told = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == -signal.SIGKILL, told.stderr
    pids = [int(word) for word in told.stdout.split()]
    assert len(pids) == 2
    ends_s = time.monotonic() + 10
    while any(running(pid) for pid in pids) and time.monotonic() < ends_s:
        time.sleep(0.02)
    assert not any(running(pid) for pid in pids)
