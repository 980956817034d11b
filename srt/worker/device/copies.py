"""Copies of this process that each do a share of some work beside it: for work that holds the interpreter's lock.

A copy has the memory of this process as it was, and none of its threads. It must leave GPUs and sockets alone, and what
other threads may hold: it does not log.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

import setproctitle

from srt.errors import SrtError
from srt.orphans import die_with

PIECE: Final = 1 << 16


class CopyError(SrtError):
    """A copy failed, ended without an answer, or took too long for one."""


class Copies:
    """`count` copies called `title`, which begin at once: `work` is given the number of each, and returns its answer.

    They have so many `seconds` from here on, and die with the thread that makes them.
    """

    def __init__(self, count: int, title: str, seconds: float, work: Callable[[int], bytes]) -> None:
        self._title, self._ends_s = title, time.monotonic() + seconds
        self._running: dict[int, int] = {}  # where its answer is read, and its pid
        self._refused: OSError | None = None
        for number in range(count):
            try:
                reading, pid = _begin(title, work, number)
            except OSError as error:
                self._refused = error
                break
            self._running[reading] = pid

    @property
    def pids(self) -> list[int]:
        """Of those that have not been waited for."""
        return list(self._running.values())

    def outcomes(self) -> list[bytes | CopyError]:
        """Wait for all of them: what each answered, or why it did not. Those whose time is over are ended. Once only.

        Where there could not be as many, those that there are do the work; if there are none, that is the one outcome.
        """
        if self._refused is not None and not self._running:
            return [CopyError(f"this process cannot be copied: {self._refused.strerror}")]
        answers = dict.fromkeys(self._running, b"")
        found: dict[int, bytes | CopyError] = {}
        with selectors.DefaultSelector() as selector:
            for reading in answers:
                selector.register(reading, selectors.EVENT_READ)
            while self._running and (ready := selector.select(max(0.0, self._ends_s - time.monotonic()))):
                for key, _ in ready:
                    piece = os.read(key.fd, PIECE)
                    answers[key.fd] += piece
                    if not piece:
                        selector.unregister(key.fd)
                        found[key.fd] = self._outcome(key.fd, answers[key.fd])
        for reading in list(self._running):
            found[reading] = CopyError(f"{self._title} took too long")
            with suppress(ProcessLookupError):
                os.kill(self._running[reading], signal.SIGKILL)
            self._reap(reading)
        return [found[reading] for reading in answers]

    def _outcome(self, reading: int, answer: bytes) -> bytes | CopyError:
        code = self._reap(reading)
        if code < 0:
            return CopyError(f"{self._title} ended by signal {-code} ({signal.strsignal(-code)})")
        if code:
            return CopyError(answer.decode(errors="replace").strip() or f"{self._title} ended with status {code}")
        return answer

    def _reap(self, reading: int) -> int:
        pid = self._running.pop(reading)
        os.close(reading)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _begin(title: str, work: Callable[[int], bytes], number: int) -> tuple[int, int]:
    """One copy: where its answer is to be read, and its pid."""
    parent = os.getpid()
    reading, writing = os.pipe()
    # No signal may make a copy leave this function, with a handler of this process, before it has its own.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = _fork()
        if not pid:
            _be_a_copy(parent, title, writing, mask, work, number)
    except OSError:
        os.close(reading)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writing)
    return reading, pid


def _fork() -> int:
    with warnings.catch_warnings():
        # What other threads hold is lost to a copy; it uses nothing of theirs.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return os.fork()


def _be_a_copy(
    parent: int, title: str, writing: int, mask: set[signal.Signals | int], work: Callable[[int], bytes], number: int
) -> NoReturn:
    """Whatever happens, a copy never returns to its caller."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: this process gets it too, and ends us
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        setproctitle.setproctitle(title)
        if die_with(parent):
            with os.fdopen(writing, "wb") as pipe:
                try:
                    answer, ended = work(number), 0
                except BaseException:
                    answer, ended = traceback.format_exc().encode(), 1
                pipe.write(answer)
            status = ended
    finally:
        os._exit(status)
