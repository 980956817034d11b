"""The threads that feed the grammar processes. Nothing is started before somebody wants a grammar."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from srt.grammar.process import Outcome, Rejected, Setup, Stored
from srt.payloads import Constraint
from srt.pipes import STOP_SECONDS, SideProcess


class Courier(Protocol):
    """Takes outcomes from one pool thread to whoever asked."""

    def deliver(self, key: bytes, outcome: Outcome) -> None:
        """What became of the constraint of this key."""
        ...

    def close(self) -> None:
        """The thread ends."""
        ...


class GrammarPool:
    """`size` processes, each with the thread that talks to it. `connect` is called once in each thread."""

    def __init__(self, setup: Setup, size: int, connect: Callable[[], Courier]) -> None:
        self._setup = setup
        self._connect = connect
        self._jobs: queue.SimpleQueue[tuple[bytes, Constraint] | None] = queue.SimpleQueue()
        self._wanted = threading.Event()
        self._closing = False
        self._threads = [threading.Thread(target=self._work, name=f"grammar-{at}", daemon=True) for at in range(size)]
        for thread in self._threads:
            thread.start()

    def submit(self, key: bytes, constraint: Constraint) -> None:
        """Compile a constraint; the outcome is delivered under `key`."""
        self._jobs.put((key, constraint))
        self._wanted.set()

    def close(self) -> None:
        """Stop the processes; jobs that wait are dropped."""
        self._closing = True
        self._wanted.set()
        while not self._jobs.empty():
            self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(self._setup.seconds + STOP_SECONDS)

    def _work(self) -> None:
        self._wanted.wait()
        if self._closing:
            return
        with contextlib.closing(self._connect()) as courier:
            process = self._start()
            while (entry := self._jobs.get()) is not None:
                key, constraint = entry
                began = time.perf_counter()
                answer = process.ask(constraint)
                if answer is None:
                    courier.deliver(key, Rejected("the process that compiles has been lost"))
                    process.end()
                    process = self._start()
                    continue
                outcome = msgspec.msgpack.decode(answer, type=Outcome)
                match outcome:
                    case Stored():
                        outcome = Stored(outcome.data_bytes, time.perf_counter() - began)
                    case Rejected():
                        pass
                courier.deliver(key, outcome)
            process.end()

    def _start(self) -> SideProcess:
        return SideProcess("srt.grammar.process", self._setup)
