"""The copy of a grammar process that compiles one constraint: what ends it, and what that is called."""

from __future__ import annotations

import mmap
import os
import signal

from srt.grammar.process import MEMORY_BYTES, Outcome, Rejected, Stored, in_a_copy

UNTOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # without room set aside (MAP_NORESERVE)
SECONDS = 20.0


def takes(size: int) -> Outcome:
    """A job that wants so many bytes."""
    room = mmap.mmap(-1, size, flags=UNTOUCHED)
    return Stored(len(room))


def killed() -> Outcome:
    """A job that breaks the library."""
    os.kill(os.getpid(), signal.SIGKILL)
    return Stored(0)


def test_what_libraries_reserve_does_not_count_against_a_constraint() -> None:
    with mmap.mmap(-1, 2 * MEMORY_BYTES, flags=UNTOUCHED):
        assert in_a_copy(lambda: takes(MEMORY_BYTES // 2), SECONDS) == Stored(MEMORY_BYTES // 2)


def test_more_memory_than_the_limit_is_not_to_be_had() -> None:
    outcome = in_a_copy(lambda: takes(2 * MEMORY_BYTES), SECONDS)
    assert isinstance(outcome, Rejected)
    assert outcome.text.startswith(f"compiling it takes more than {MEMORY_BYTES} bytes")


def test_a_copy_that_is_killed_is_told_of_with_the_signal() -> None:
    outcome = in_a_copy(killed, SECONDS)
    assert isinstance(outcome, Rejected)
    assert outcome.text.endswith("(SIGKILL)")
