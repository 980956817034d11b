"""What a job in a copy of a grammar process may take."""

from __future__ import annotations

import mmap
from functools import partial

import pytest

from srt.grammar import process
from srt.grammar.process import Outcome, Rejected, Stored, data_bytes, in_a_copy

LIMIT = 64 << 20


def taking(count: int) -> Outcome:
    """A job that needs so many bytes."""
    return Stored(len(bytearray(count)))


def reserved(count: int) -> mmap.mmap:
    """Writable memory that nobody touches."""
    return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_a_job_has_its_memory_beyond_what_libraries_reserved_and_did_not_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MEMORY_BYTES", LIMIT)
    with reserved(8 * LIMIT):
        assert in_a_copy(partial(taking, LIMIT // 2), 10.0) == Stored(LIMIT // 2)
        refused = in_a_copy(partial(taking, 2 * LIMIT), 10.0)
    assert isinstance(refused, Rejected)
    assert f"more than {LIMIT} bytes" in refused.text


def test_what_counts_against_the_limit_is_what_is_reserved() -> None:
    before = data_bytes()
    with reserved(LIMIT):
        assert data_bytes() - before == pytest.approx(LIMIT, rel=0.2)
