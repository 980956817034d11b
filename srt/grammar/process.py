"""A grammar process: compiles one constraint at a time, away from the process that handles text.

`python -m srt.grammar.process`, started by `srt/tokenizer/grammar_pool.py`, spoken to over stdin and stdout. It imports
the grammar library once and compiles each constraint in a copy of itself. One that takes too long, or too much memory,
ends that copy and nothing else: the kernel's timer kills it. The timer counts what the copy computes: on a busy machine
compiling takes longer, but no constraint is refused for that.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Final

import msgspec
import setproctitle

from srt.copies import Copies, CopyError, ending
from srt.grammar.backends import open_backend
from srt.grammar.contract import GrammarBackend, Vocabulary
from srt.grammar.errors import GrammarError
from srt.grammar.shelf import GrammarFiles, key_of
from srt.grammar.texts import check
from srt.payloads import Constraint
from srt.pipes import receive, send

TITLE: Final = "srt:grammar"

NICENESS: Final = 5
"""Answers go first where cores are wanted by both."""

MEMORY_BYTES: Final = 2 << 30
"""What compiling may take beyond what the libraries take."""

COMPILED_BYTES: Final = 64 << 20
"""Largest compiled grammar: workers read it while others wait."""


class Setup(msgspec.Struct, frozen=True):
    """First message: what is the same for all constraints."""

    backend: str
    model_path: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    rundir: str
    seconds: float
    """What compiling one constraint may take of a core."""


class Stored(msgspec.Struct, frozen=True, tag=True):
    """The compiled grammar is in the file that its key names. `data_bytes`: its size; `seconds`: what it took."""

    data_bytes: int
    seconds: float = 0.0


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The constraint cannot be obeyed, and why."""

    text: str


Outcome = Stored | Rejected


def compile_one(constraint: Constraint, backend: GrammarBackend, files: GrammarFiles) -> Outcome:
    """Do one job."""
    try:
        check(constraint)
        data = backend.compile(constraint)
    except GrammarError as error:
        return Rejected(str(error))
    except MemoryError:
        return Rejected(f"compiling it takes more than {MEMORY_BYTES} bytes")
    if len(data) > COMPILED_BYTES:
        return Rejected(f"it has {len(data)} bytes when compiled, the limit is {COMPILED_BYTES}")
    try:
        files.write(key_of(constraint), data, str(os.getpid()))
    except OSError as error:
        return Rejected(f"it could not be stored: {error.strerror}")
    return Stored(len(data))


def in_a_copy(job: Callable[[], Outcome], seconds: float) -> Outcome:
    """Do a job in a copy of this process, which has no threads, and say what became of it."""
    (answer,) = Copies(1, TITLE, None, partial(_limited, job, seconds)).outcomes()
    if not isinstance(answer, CopyError):
        outcome: Outcome = msgspec.msgpack.decode(answer, type=Outcome)
        return outcome
    if answer.code is None:
        return Rejected(str(answer))
    if answer.code == -signal.SIGPROF:
        return Rejected(f"compiling it takes more than {seconds:g} s (--max-grammar-seconds)")
    how = ending(answer.code)
    return Rejected(f"compiling it takes more than {MEMORY_BYTES} bytes, or breaks the grammar library ({how})")


def _limited(job: Callable[[], Outcome], seconds: float) -> bytes:
    """What came of a job, packed. Limits this process for good."""
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    outcome = job()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return msgspec.msgpack.encode(outcome)


def data_bytes() -> int:
    """What counts against the limit so far: writable memory, touched or not. Libraries for GPUs reserve far more of it
    than they touch."""
    # Not from `statm`, which has zero in its place on kernels that enforce the limit all the same (gVisor).
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))
    return int(kib) << 10


def serve(jobs: IO[bytes], outcomes: IO[bytes]) -> None:
    """Do jobs until the other end closes."""
    first = receive(jobs)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    vocabulary = Vocabulary.read(Path(setup.model_path), setup.vocab_size, setup.eos_ids)
    backend = open_backend(setup.backend, vocabulary)
    files = GrammarFiles(Path(setup.rundir))
    decoder = msgspec.msgpack.Decoder(Constraint)
    while (payload := receive(jobs)) is not None:
        constraint = decoder.decode(payload)
        send(outcomes, in_a_copy(partial(compile_one, constraint, backend, files), setup.seconds))


def main() -> None:
    """Entry of the process."""
    setproctitle.setproctitle(TITLE)
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server stops in order
    # What a library prints must not come between messages.
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, outcomes)
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
