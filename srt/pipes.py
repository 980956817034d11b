"""A process that does jobs for another one, and the pipes between them: one message in, one message out.

For work that may take too long, or break what does it: the process ends then, and nothing else.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import IO, Final

import msgspec

LENGTH_BYTES: Final = 8
STOP_SECONDS: Final = 1.0


def send(pipe: IO[bytes], message: msgspec.Struct) -> None:
    """Write a message with its length in front."""
    payload = msgspec.msgpack.encode(message)
    pipe.write(len(payload).to_bytes(LENGTH_BYTES, "little"))
    pipe.write(payload)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes | None:
    """Read a message; None if the other end is gone."""
    head = pipe.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    size = int.from_bytes(head, "little")
    payload = pipe.read(size)
    return payload if len(payload) == size else None


class SideProcess:
    """`python -m MODULE`, which is told `setup` first and then one job after the other over its stdin."""

    def __init__(self, module: str, setup: msgspec.Struct) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs, self._answers = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # then the first job finds it out
            send(self._jobs, setup)

    def ask(self, job: msgspec.Struct) -> bytes | None:
        """Have a job done; None if the process ended instead."""
        try:
            send(self._jobs, job)
            return receive(self._answers)
        except BrokenPipeError:
            return None

    def status(self) -> int:
        """The exit status of a process that is ending by itself; minus the signal that killed it."""
        return self._process.wait()

    def end(self) -> None:
        """Let it end, and see that it does."""
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        self._answers.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
