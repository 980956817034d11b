"""Copies of a process that do a share of its work each."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srt.worker.device.copies import Copies, CopyError

PARENT = """
import os, sys, time
from srt.worker.device.copies import Copies

def work(number):
    time.sleep(600)
    return b""

copies = Copies(2, "srt:test copies", work)
print(*copies.pids, flush=True)
os.kill(os.getpid(), 9)
"""


def running(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hang(number: int) -> bytes:
    time.sleep(600)
    return b""


def test_each_copy_does_its_share_and_answers_in_its_place() -> None:
    mine = os.getpid()

    def work(number: int) -> bytes:
        assert os.getpid() != mine
        return bytes([number]) * (200_000 + number)  # more than a pipe holds

    answers = Copies(3, "srt:test copies", work).answers(30)
    assert answers == [bytes([number]) * (200_000 + number) for number in range(3)]


def test_what_fails_in_a_copy_is_told_and_no_other_is_left_running() -> None:
    def work(number: int) -> bytes:
        if number == 0:
            raise ValueError("no such kernel")
        return hang(number)

    copies = Copies(2, "srt:test copies", work)
    pids = copies.pids
    with pytest.raises(CopyError, match=r"ValueError: no such kernel$"):
        copies.answers(30)
    assert not any(running(pid) for pid in pids)


def test_a_copy_that_is_killed_is_told() -> None:
    def work(number: int) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    copies = Copies(1, "srt:test copies", work)
    with pytest.raises(CopyError, match="srt:test copies ended by SIGKILL"):
        copies.answers(30)


def test_a_copy_that_hangs_is_ended_when_its_time_is_over() -> None:
    copies = Copies(2, "srt:test copies", hang)
    pids = copies.pids
    with pytest.raises(CopyError, match="2 srt:test copies have not ended in time"):
        copies.answers(0.2)
    assert not any(running(pid) for pid in pids)


def test_a_process_that_cannot_be_copied_says_so_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    fork = os.fork

    def once() -> int:
        if begun:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        begun.append(fork())
        return begun[0]

    monkeypatch.setattr(os, "fork", once)
    copies = Copies(2, "srt:test copies", hang)
    with pytest.raises(CopyError, match="cannot be copied: Resource temporarily unavailable"):
        copies.answers(30)
    assert not running(begun[0])


def test_copies_die_with_the_process_that_made_them() -> None:
    told = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == -signal.SIGKILL, told.stderr
    pids = [int(word) for word in told.stdout.split()]
    assert len(pids) == 2
    ends_s = time.monotonic() + 10
    while any(running(pid) for pid in pids) and time.monotonic() < ends_s:
        time.sleep(0.02)
    assert not any(running(pid) for pid in pids)
