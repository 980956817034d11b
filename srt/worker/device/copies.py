"""Copies of this process that each do a share of some work beside it: for work that holds the interpreter's lock.

A copy has the memory of this process as it was, and none of its threads. It must leave GPUs and sockets alone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Final, NoReturn

import setproctitle

from srt.errors import SrtError

PR_SET_PDEATHSIG: Final = 1
PIECE: Final = 1 << 16


class CopyError(SrtError):
    """A copy failed, ended without an answer, or takes too long for one."""


class Copies:
    """`count` copies called `title`, which begin at once: `work` is given the number of each, and returns its answer.

    They die with the thread that makes them. Where there cannot be as many there are none, and `answers` says why.
    """

    def __init__(self, count: int, title: str, work: Callable[[int], bytes]) -> None:
        self._title = title
        self._running: dict[int, int] = {}  # pid: where its answer is read
        self._refused: OSError | None = None
        parent = os.getpid()
        try:
            for number in range(count):
                reading, writing = os.pipe()
                pid = _fork()
                if not pid:
                    _be_a_copy(parent, title, writing, work, number)
                os.close(writing)
                self._running[pid] = reading
        except OSError as error:
            self.end()
            self._refused = error

    @property
    def pids(self) -> list[int]:
        """Of those that have not been waited for."""
        return list(self._running)

    def answers(self, seconds: float) -> list[bytes]:
        """Wait for all of them, so long at most. None is left running, whatever comes of it.

        Raises: CopyError.
        """
        if self._refused is not None:
            raise CopyError(f"this process cannot be copied: {self._refused.strerror}")
        ends_s = time.monotonic() + seconds
        try:
            return [self._answer(pid, ends_s) for pid in self.pids]
        finally:
            self.end()

    def end(self) -> None:
        """Leave none running."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            self._reap(pid)

    def _answer(self, pid: int, ends_s: float) -> bytes:
        answer, reading = b"", self._running[pid]
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        while poll.poll(max(0, 1000 * (ends_s - time.monotonic()))):
            piece = os.read(reading, PIECE)
            if not piece:
                break
            answer += piece
        else:
            raise CopyError(f"{len(self._running)} {self._title} have not ended in time")
        code = self._reap(pid)
        if code < 0:
            raise CopyError(f"{self._title} ended by {signal.Signals(-code).name}")
        if code:
            raise CopyError(answer.decode(errors="replace").strip())
        return answer

    def _reap(self, pid: int) -> int:
        os.close(self._running.pop(pid))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork() -> int:
    with warnings.catch_warnings():
        # What other threads hold is lost to a copy; it uses nothing of theirs.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return os.fork()


def _be_a_copy(parent: int, title: str, writing: int, work: Callable[[int], bytes], number: int) -> NoReturn:
    """Whatever happens, a copy never returns to its caller."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: this process gets it too, and ends us
        setproctitle.setproctitle(title)
        if os.getppid() == parent:
            try:
                answer, status = work(number), 0
            except BaseException:
                answer = traceback.format_exc().encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer)
    finally:
        os._exit(status)
