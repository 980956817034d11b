"""Copies of this process that do work beside it: what may break or take too much, or holds the interpreter's lock.

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
    """A copy failed, ended without an answer, or took too long for one. `code` is its exit status, or minus the signal
    that ended it; None if it did not end of itself."""

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.code = code


class Copies:
    """`count` copies called `title`, which begin to `work` at once; what that returns is the answer of each.

    They have so many `seconds` from here on (None: what they take), and die with the thread that makes them.
    """

    def __init__(self, count: int, title: str, seconds: float | None, work: Callable[[], bytes]) -> None:
        self._title = title
        self._ends_s = None if seconds is None else time.monotonic() + seconds
        self._running: dict[int, int] = {}  # where its answer is read, and its pid
        self._refused: OSError | None = None
        for _ in range(count):
            try:
                reading, pid = _begin(title, work)
            except OSError as error:
                self._refused = error
                break
            self._running[reading] = pid

    @property
    def pids(self) -> list[int]:
        """Of those that have not been waited for."""
        return list(self._running.values())

    def outcomes(self) -> list[bytes | CopyError]:
        """Wait for all of them: what each answered, or why it did not, in the order in which they ended. Once only.

        Those whose time is over are ended. Where there could not be as many, those that there are do the work; if there
        are none, that is the one outcome.
        """
        if self._refused is not None and not self._running:
            return [CopyError(f"this process cannot be copied: {self._refused.strerror}")]
        found: list[bytes | CopyError] = []
        answers = dict.fromkeys(self._running, b"")
        with selectors.DefaultSelector() as selector:
            for reading in answers:
                selector.register(reading, selectors.EVENT_READ)
            while self._running and (ready := selector.select(self._left_s())):
                for key, _ in ready:
                    piece = os.read(key.fd, PIECE)
                    answers[key.fd] += piece
                    if not piece:
                        selector.unregister(key.fd)
                        found.append(self._outcome(key.fd, answers[key.fd]))
        for reading, pid in list(self._running.items()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._reap(reading)
            found.append(CopyError(f"{self._title} took too long"))
        return found

    def _left_s(self) -> float | None:
        return None if self._ends_s is None else max(0.0, self._ends_s - time.monotonic())

    def _outcome(self, reading: int, answer: bytes) -> bytes | CopyError:
        code = self._reap(reading)
        if code == 0:
            return answer
        return CopyError(answer.decode(errors="replace").strip() or f"{self._title} ended by {ending(code)}", code)

    def _reap(self, reading: int) -> int:
        pid = self._running.pop(reading)
        os.close(reading)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ending(code: int) -> str:
    """What ended a process: "SIGKILL", "status 1"."""
    names = {-number.value: number.name for number in signal.Signals}
    return names.get(code, f"signal {-code}" if code < 0 else f"status {code}")


def _begin(title: str, work: Callable[[], bytes]) -> tuple[int, int]:
    """One copy: where its answer is to be read, and its pid."""
    parent = os.getpid()
    reading, writing = os.pipe()
    # No signal may make a copy leave this function, with a handler of this process, before it has its own.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = _fork()
        if not pid:
            _be_a_copy(parent, title, writing, mask, work)
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
    parent: int, title: str, writing: int, mask: set[signal.Signals | int], work: Callable[[], bytes]
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
                    answer, ended = work(), 0
                except BaseException:
                    answer, ended = traceback.format_exc().encode(), 1
                pipe.write(answer)
            status = ended
    finally:
        os._exit(status)
