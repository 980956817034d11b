"""What a server owns outside its processes: a private directory and a TCP port."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from srt.configs.plan import RuntimePlan
from srt.errors import StartupError
from srt.launch import PLAN

SOCKET_PATH_BYTES: Final = 107
"""Longest path of a unix socket on Linux."""
LONGEST_INBOX: Final = "scheduler.sock.lock"


def make_rundir() -> Path:
    """A new directory that only this user may enter, with a path short enough for unix sockets."""
    rundir = Path(tempfile.mkdtemp(prefix="srt-"))
    if len(os.fsencode(rundir / LONGEST_INBOX)) > SOCKET_PATH_BYTES:
        rundir.rmdir()
        rundir = Path(tempfile.mkdtemp(prefix="srt-", dir="/tmp"))
    return rundir


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
