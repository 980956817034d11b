"""Signs of life in shared memory: every process writes one, anybody may read all, nobody has to answer.

The board is a small memory-mapped file in the server's directory with one fixed slot a process:

    name, 32 bytes | pid | beat_ns | step | step_started_ns        (int64, CLOCK_MONOTONIC, which all processes share)

A thread of each process beats every `BEAT_S`, so a process that was stopped or died turns late, while one that
computes a long step does not: torch and sockets release the interpreter lock. Nothing is ever reset: a process that
goes on beats on.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

BEAT_S: Final = 0.5
LATE_S: Final = 3.0
"""A process whose last beat is older than this is late; six beats are missing then."""

BOARD: Final = "board"
NAME_BYTES: Final = 32
SLOT_BYTES: Final = NAME_BYTES + 4 * 8
PID, BEAT, STEP, STEP_STARTED = range(NAME_BYTES // 8, SLOT_BYTES // 8)


def process_name(role: str, rank: int = 0) -> str:
    """Title of a process, the same in process lists, logs and on the board: `srt:api`, `srt:worker[0]`."""
    return f"srt:{role}[{rank}]" if role == "worker" else f"srt:{role}"


class Age(msgspec.Struct, frozen=True):
    """How old the signs of one process are, in seconds. None: it has not beaten yet, or is in no step."""

    name: str
    pid: int
    beat_s: float | None
    step: int
    step_s: float | None


class Board:
    """All slots of one server."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("q")
        self._names = [
            bytes(self._bytes[at : at + NAME_BYTES]).rstrip(b"\0").decode()
            for at in range(0, len(self._bytes), SLOT_BYTES)
        ]

    @classmethod
    def create(cls, rundir: Path, names: Sequence[str]) -> Board:
        """Write an empty board with one slot for each of `names`, and open it."""
        content = bytearray(SLOT_BYTES * len(names))
        for index, name in enumerate(names):
            content[index * SLOT_BYTES : index * SLOT_BYTES + NAME_BYTES] = name.encode().ljust(NAME_BYTES, b"\0")
        (rundir / BOARD).write_bytes(content)
        return cls.open(rundir)

    @classmethod
    def open(cls, rundir: Path) -> Board:
        """The board of the server that lives in `rundir`."""
        descriptor = os.open(rundir / BOARD, os.O_RDWR)
        try:
            return cls(mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)

    def slot(self, name: str) -> memoryview[int]:
        """The eight words of a process's slot, writable.

        Raises: KeyError if the board has no such name.
        """
        if name not in self._names:
            raise KeyError(f"{name} has no slot on this board")
        at = self._names.index(name) * SLOT_BYTES // 8
        return self._words[at : at + SLOT_BYTES // 8]

    def ages(self) -> list[Age]:
        """The signs of every process, in the order of the slots."""
        now = time.monotonic_ns()
        ages = []
        for name in self._names:
            words = self.slot(name).tolist()
            beat_s = (now - words[BEAT]) / 1e9 if words[BEAT] else None
            step_s = (now - words[STEP_STARTED]) / 1e9 if words[STEP_STARTED] else None
            ages.append(Age(name, words[PID], beat_s, words[STEP], step_s))
        return ages

    def late(self, max_age_s: float = LATE_S) -> list[str]:
        """Names of the processes that have not beaten for `max_age_s`, or never."""
        return [age.name for age in self.ages() if age.beat_s is None or age.beat_s > max_age_s]


class Heartbeat:
    """One process's own signs. `stopping` turns true when the process is asked to end."""

    def __init__(self, slot: memoryview[int]) -> None:
        self.stopping = False
        self._slot = slot
        self._slot[PID] = os.getpid()
        self._closed = threading.Event()

    @classmethod
    def attach(cls, board: Board, name: str) -> Heartbeat:
        """Write to the slot `name` of `board` from now on, and beat until `close`."""
        heartbeat = cls(board.slot(name))
        heartbeat._beat()
        threading.Thread(target=heartbeat._beat_on, name="heartbeat", daemon=True).start()
        return heartbeat

    @classmethod
    def detached(cls) -> Heartbeat:
        """Signs that nobody reads, without a thread: for a part that runs outside a server."""
        return cls(memoryview(bytearray(SLOT_BYTES)).cast("q"))

    def stop(self) -> None:
        """Ask the process to end; it looks at `stopping` at least every 250 ms."""
        self.stopping = True

    def step_begins(self, step: int) -> None:
        """The process starts step number `step`."""
        self._slot[STEP] = step
        self._slot[STEP_STARTED] = time.monotonic_ns()

    def step_ended(self) -> None:
        """The process is idle again."""
        self._slot[STEP_STARTED] = 0

    def close(self) -> None:
        """Beat no more."""
        self._closed.set()

    def _beat(self) -> None:
        self._slot[BEAT] = time.monotonic_ns()

    def _beat_on(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._beat()
