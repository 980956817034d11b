"""A grammar process: compiles one constraint at a time, away from the process that handles text.

`python -m srt.grammar.process`, started by `srt/tokenizer/grammar_desk.py`, spoken to over stdin and stdout. A
constraint that takes too long, or too much memory, ends this process and nothing else: the kernel's timer kills it,
and another one is started. The timer counts what the process computes: on a busy machine compiling takes longer, but
no constraint is refused for that.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import msgspec
import setproctitle

from srt.grammar.backends import open_backend
from srt.grammar.contract import GrammarBackend, Vocabulary
from srt.grammar.errors import GrammarError
from srt.grammar.shelf import GrammarFiles, key_of
from srt.grammar.texts import check
from srt.payloads import Constraint
from srt.pipes import receive, send

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


def serve(jobs: IO[bytes], outcomes: IO[bytes], limit: Callable[[float], object]) -> None:
    """Do jobs until the other end closes. `limit` starts a timer for a job; 0 stops it."""
    first = receive(jobs)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    vocabulary = Vocabulary.read(Path(setup.model_path), setup.vocab_size, setup.eos_ids)
    backend = open_backend(setup.backend, vocabulary)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    files = GrammarFiles(Path(setup.rundir))
    decoder = msgspec.msgpack.Decoder(Constraint)
    while (payload := receive(jobs)) is not None:
        limit(setup.seconds)
        outcome = compile_one(decoder.decode(payload), backend, files)
        limit(0)
        send(outcomes, outcome)


def main() -> None:
    """Entry of the process."""
    setproctitle.setproctitle("srt:grammar")
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server stops in order
    # What a library prints must not come between messages.
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, outcomes, lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds))
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
