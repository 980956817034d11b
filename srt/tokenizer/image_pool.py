"""A few image processes and the threads that feed them: images are decoded beside text, never before it."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from srt.errors import ErrorCode
from srt.tokenizer.image_process import Job, Outcome, Refused, Setup, receive, send

Deliver = Callable[[int, Outcome], None]
"""Called in a pool thread with a job's number and what became of it."""

STOP_SECONDS: Final = 1.0


class ImagePool:
    """`size` processes, each with the thread that talks to it. Jobs are done in the order they come.

    `connect` is called once in each thread and makes what the thread delivers outcomes with.
    """

    def __init__(self, setup: Setup, size: int, connect: Callable[[], Deliver]) -> None:
        self._setup = setup
        self._jobs: queue.SimpleQueue[tuple[int, Job] | None] = queue.SimpleQueue()
        self._connect = connect
        self._threads = [threading.Thread(target=self._run, name=f"image-{at}", daemon=True) for at in range(size)]
        for thread in self._threads:
            thread.start()

    def submit(self, number: int, job: Job) -> None:
        """Do a job some time; its outcome is delivered under `number`."""
        self._jobs.put((number, job))

    def close(self) -> None:
        """Stop the processes; jobs that wait are dropped."""
        while not self._jobs.empty():
            self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(self._setup.seconds + STOP_SECONDS)

    def _run(self) -> None:
        deliver = self._connect()
        process = self._start()
        while (entry := self._jobs.get()) is not None:
            number, job = entry
            outcome = _ask(process, job)
            if outcome is None:
                outcome = self._explain(process.wait())
                _end(process)
                process = self._start()
            deliver(number, outcome)
        _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "srt.tokenizer.image_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        send(process.stdin, self._setup)
        return process

    def _explain(self, status: int) -> Refused:
        """What to tell the client of an image that ended its process."""
        if status == -signal.SIGALRM:
            text = f"the image could not be decoded within {self._setup.seconds:g} s (--max-image-seconds)"
        else:
            text = "the image made its decoder fail"
        return Refused(ErrorCode.INVALID_REQUEST, text)


def _ask(process: subprocess.Popen[bytes], job: Job) -> Outcome | None:
    """Have a job done; None if the process ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        send(process.stdin, job)
        answer = receive(process.stdout)
    except BrokenPipeError:
        return None
    return None if answer is None else msgspec.msgpack.decode(answer, type=Outcome)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
