"""What a server owns outside its processes: a private directory and a TCP port."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from srt.configs.plan import RuntimePlan
from srt.errors import StartupError
from srt.launch import PLAN

SOCKET_PATH_BYTES: Final = 107
"""Longest path of a unix socket on Linux."""
LONGEST_INBOX: Final = "scheduler.sock.lock"
PREFIX: Final = "srt-"
LOCK: Final = "lock"
"""A file that the server holds a lock on for as long as it lives; the kernel lets go of it for a killed one."""


@contextmanager
def private_directory() -> Iterator[Path]:
    """The directory of one server, gone at the end of the block; those that killed servers have left go too."""
    sweep()
    rundir = make_rundir()
    draft = rundir / f"{LOCK}.new"
    try:
        with draft.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            draft.rename(rundir / LOCK)  # it has its name only once it is locked: nobody sweeps a newborn
            yield rundir
    finally:
        shutil.rmtree(rundir, ignore_errors=True)


def make_rundir() -> Path:
    """A new directory that only this user may enter, with a path short enough for unix sockets."""
    rundir = Path(tempfile.mkdtemp(prefix=PREFIX))
    if len(os.fsencode(rundir / LONGEST_INBOX)) > SOCKET_PATH_BYTES:
        rundir.rmdir()
        rundir = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    return rundir


def sweep() -> None:
    """Remove directories whose servers were killed: they may hold a gigabyte of images."""
    for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:
        for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
            with contextlib.suppress(OSError), lock.open() as file:  # another user's, or held by a living server
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock.stat().st_uid == os.getuid():
                    shutil.rmtree(lock.parent, ignore_errors=True)


def write_plan(rundir: Path, plan: RuntimePlan) -> None:
    """Put the plan where every child reads it."""
    (rundir / PLAN).write_bytes(msgspec.msgpack.encode(plan))


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind the server's address without listening on it; close the socket when the API process listens.

    Both set SO_REUSEADDR, so they may share the address, and a port that somebody else listens on is noticed before
    anything is loaded. Port 0 becomes a free one. Raises: StartupError with host and port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise StartupError(f"--host {host} is no address of this machine: {error.strerror}") from error
    reserved = socket.socket(family, kind, protocol)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"port {port} of {host} is taken; choose another one with --port") from error
        raise StartupError(f"port {port} of {host} cannot be used: {error.strerror}") from error
    return reserved
