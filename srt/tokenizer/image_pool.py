"""A few image processes and the threads that feed them: images are decoded beside text, never before it."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from srt.errors import ErrorCode, ServingError
from srt.pipes import STOP_SECONDS, SideProcess
from srt.tokenizer.image_jobs import Job, Outcome, Refused, Setup
from srt.tokenizer.media import Fetcher

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
                answer = process.ask(job)
                if answer is None:
                    courier.deliver(number, self._explain(process.status()))
                    process.end()
                    process = self._start()
                else:
                    courier.deliver(number, msgspec.msgpack.decode(answer, type=Outcome))
            process.end()

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

    def _start(self) -> SideProcess:
        return SideProcess("srt.tokenizer.image_process", self._setup)

    def _explain(self, status: int) -> Refused:
        """What to tell the client of an image that ended its process."""
        if status == -signal.SIGALRM:
            text = f"the image could not be decoded within {self._setup.seconds:g} s (--max-image-seconds)"
        else:
            text = "the image made its decoder fail"
        return Refused(ErrorCode.INVALID_REQUEST, text)
