"""A few image processes and the threads that feed them: images are decoded beside text, never before it."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from srt.errors import ErrorCode, ServingError
from srt.tokenizer.image_jobs import Job, Outcome, Refused, Setup, receive, send
from srt.tokenizer.media import Fetcher

STOP_SECONDS: Final = 1.0
FETCH_THREADS: Final = 8
"""Images that are fetched at the same time; a slow host holds up its own images, never those in requests."""


class Courier(Protocol):
    """Takes outcomes from one pool thread to whoever asked."""

    def deliver(self, number: int, outcome: Outcome) -> None:
        """What became of a job."""
        ...

    def close(self) -> None:
        """The thread ends."""
        ...


class ImagePool:
    """`size` processes, each with the thread that talks to it. Jobs are done in the order they come.

    `connect` is called once in each thread.
    """

    def __init__(self, setup: Setup, size: int, fetcher: Fetcher, connect: Callable[[], Courier]) -> None:
        self._setup = setup
        self._fetcher = fetcher
        self._connect = connect
        self._jobs: queue.SimpleQueue[tuple[int, Job] | None] = queue.SimpleQueue()
        self._urls: queue.SimpleQueue[tuple[int, str, bool] | None] = queue.SimpleQueue()
        self._workers = [threading.Thread(target=self._work, name=f"image-{at}", daemon=True) for at in range(size)]
        self._fetchers = [
            threading.Thread(target=self._fetch, name=f"fetch-{at}", daemon=True)
            for at in range(FETCH_THREADS if fetcher.domains else 0)
        ]
        for thread in (*self._workers, *self._fetchers):
            thread.start()

    def submit(self, number: int, job: Job) -> None:
        """Decode and cut an image file; the outcome is delivered under `number`."""
        self._jobs.put((number, job))

    def fetch(self, number: int, url: str, *, crops: bool) -> None:
        """Fetch an image file, then do the same."""
        self._urls.put((number, url, crops))

    def allow(self, url: str) -> None:
        """Raises: ServingError if a URL is not one to fetch from."""
        self._fetcher.allow(url)

    def close(self) -> None:
        """Stop the processes; jobs that wait are dropped."""
        while not self._jobs.empty():
            self._jobs.get_nowait()
        for _ in self._workers:
            self._jobs.put(None)
        for _ in self._fetchers:
            self._urls.put(None)
        for thread in (*self._workers, *self._fetchers):
            thread.join(self._setup.seconds + STOP_SECONDS)

    def _work(self) -> None:
        with contextlib.closing(self._connect()) as courier:
            process = self._start()
            while (entry := self._jobs.get()) is not None:
                number, job = entry
                outcome = _ask(process, job)
                if outcome is None:
                    outcome = self._explain(process.wait())
                    _end(process)
                    process = self._start()
                courier.deliver(number, outcome)
            _end(process)

    def _fetch(self) -> None:
        with contextlib.closing(self._connect()) as courier:
            while (entry := self._urls.get()) is not None:
                number, url, crops = entry
                try:
                    data = self._fetcher.fetch(url)
                except ServingError as error:
                    courier.deliver(number, Refused(error.code, error.text))
                else:
                    self.submit(number, Job(data, base64=False, crops=crops))

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "srt.tokenizer.image_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the first job finds it out
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
