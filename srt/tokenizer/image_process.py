"""An image process: decodes and cuts one image at a time, away from the process that handles text.

`python -m srt.tokenizer.image_process`, started by `srt/tokenizer/image_pool.py`, spoken to over stdin and stdout.
A file that takes too long, or breaks the decoder, ends this process and nothing else: the kernel's timer kills it,
the pool starts another.
"""

from __future__ import annotations

import binascii
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import msgspec
import setproctitle

from srt.errors import ErrorCode, ServingError
from srt.pipes import receive, send
from srt.tiles import TileFiles
from srt.tokenizer.image_jobs import Job, Made, Outcome, Refused, Setup, refuse
from srt.tokenizer.images import make_views

NICENESS: Final = 10
"""Text goes first where cores are wanted by both."""


def from_base64(text: bytes, limit: int) -> bytes:
    """The bytes that a base64 text stands for; white space in it is allowed.

    Raises: ServingError if it is something else, or longer than `limit` bytes decoded.
    """
    if len(text) * 3 // 4 > 2 * limit:
        raise refuse(f"the image has about {len(text) * 3 // 4} bytes, the limit is {limit} (--max-image-bytes)")
    try:
        return binascii.a2b_base64(b"".join(text.split()), strict_mode=True)
    except binascii.Error as error:
        raise refuse(
            f"the image is neither a data URI, nor a URL, nor base64 ({error}); it begins with {text[:24]!r}; "
            "local paths are never read"
        ) from error


def make(job: Job, setup: Setup, files: TileFiles) -> Outcome:
    """Do one job."""
    try:
        data = from_base64(job.data, setup.limits.bytes) if job.base64 else job.data
        views = make_views(data, setup.config, setup.limits, setup.rule, crops=job.crops)
    except ServingError as error:
        return Refused(error.code, error.text)
    except MemoryError:
        return Refused(ErrorCode.INVALID_REQUEST, "there is not enough memory to decode the image")
    key = views.key()
    try:
        files.write(key, views.buffers(), str(os.getpid()))
    except OSError as error:
        return Refused(ErrorCode.INTERNAL, f"the image's tiles could not be stored: {error.strerror}")
    return Made(key, views.columns, views.rows)


def serve(jobs: IO[bytes], outcomes: IO[bytes], limit: Callable[[float], object]) -> None:
    """Do jobs until the pool closes its end. `limit` starts a timer for a job; 0 stops it."""
    first = receive(jobs)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    files = TileFiles(Path(setup.rundir), setup.config)
    decoder = msgspec.msgpack.Decoder(Job)
    while (payload := receive(jobs)) is not None:
        limit(setup.seconds)
        outcome = make(decoder.decode(payload), setup, files)
        limit(0)
        send(outcomes, outcome)


def main() -> None:
    """Entry of the process."""
    setproctitle.setproctitle("srt:image")
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server stops in order
    # What a library prints must not come between messages.
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, outcomes, lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds))
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
