"""The api process: one TCP listener, one event loop, one inbox.

The inbox's descriptor is edge-triggered: when it turns readable everything is taken out, and every poll looks again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
import uvloop
import zmq

from srt.api.app import Gate
from srt.api.auth import Secrets
from srt.api.connection import Connection, Settings, drop_overdue
from srt.api.front import Front
from srt.api.service import Life
from srt.api.tls import tls_context
from srt.configs.plan import RuntimePlan
from srt.errors import StartupError
from srt.heartbeat import Heartbeat
from srt.messages import Ready
from srt.wire import Outbox

log = logging.getLogger(__name__)

POLL_S: Final = 0.2
KEEP_ALIVE_S: Final = 75
"""How long an idle connection stays open."""

BACKLOG: Final = 2048
GARBAGE_EVERY: Final = 50_000
"""New objects between two collections of the youngest; Python's 700 cost a tenth of this process's time."""

SPARE_FILES: Final = 128
"""Open files of this process beside its connections, with room to spare."""

GOODBYE_S: Final = 2.0
"""How long connections may take to carry away the last bytes of a drained server."""


class QuietServer(uvicorn.Server):
    """uvicorn without hands on the process's signals: those belong to the process's entry."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """The one listener. Raises: StartupError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StartupError(f"cannot listen on {host}:{port}: {reason}") from error
    listener.setblocking(False)
    return listener


def room_for(connections: int) -> int:
    """Raise this process's limit of open files for so many connections; returns for how many there is room."""
    wanted = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning("%d open files are allowed here: at most %d connections", hard, max(1, soft - SPARE_FILES))
            return max(1, soft - SPARE_FILES)
    return connections


class ApiProcess:
    """The HTTP server before the front."""

    def __init__(self, plan: RuntimePlan, rundir: Path, secrets: Secrets, context: zmq.Context[Any]) -> None:
        tls = tls_context(plan.server)
        self.scheme = "http" if tls is None else "https"
        self.front = Front(plan, rundir, context)
        self.service = self.front.service
        self.listener = listen(plan.server.host, plan.server.port)
        config = Settings(
            Gate(self.service, secrets),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(GOODBYE_S),
            ssl_context_factory=None if tls is None else lambda _settings, _default: tls,
        )
        config.max_connections = room_for(plan.server.max_connections)
        self.server = QuietServer(config)

    def close(self) -> None:
        """Close the sockets."""
        self.listener.close()
        self.front.close()

    async def serve(self, beat: Heartbeat, launch: Outbox, rank: int) -> None:
        """Answer HTTP until `beat.stopping`, then finish what runs."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.front.inbox.fileno(), self.front.receive)
        serving = asyncio.create_task(self.server.serve(sockets=[self.listener]))
        try:
            host, port = self.listener.getsockname()[:2]
            launch.send(Ready("api", rank, {"listening": f"{self.scheme}://{host}:{port}"}))
            while not beat.stopping and not serving.done():
                await self.poll()
            await self.drain(serving)
        finally:
            self.server.should_exit = True
            await serving
            loop.remove_reader(self.front.inbox.fileno())

    async def poll(self) -> None:
        """What is done several times a second."""
        self.front.receive()
        self.service.streams.drop_stalled()
        drop_overdue(self.server.server_state.connections)
        await asyncio.sleep(POLL_S)

    async def drain(self, serving: asyncio.Task[None]) -> None:
        """Take nothing new, let running calls end; those that take too long are aborted."""
        service = self.service
        service.life = Life.DRAINING
        deadline = asyncio.get_running_loop().time() + service.plan.server.drain_timeout
        while len(service.streams) and asyncio.get_running_loop().time() < deadline and not serving.done():
            await self.poll()
        service.streams.end_all("the server is shutting down")


def run(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat, secrets: Secrets | None = None) -> None:
    """Serve until `beat.stopping` and everything that runs has ended. Raises: StartupError if it cannot listen."""
    context: zmq.Context[Any] = zmq.Context()
    launch = Outbox(context, rundir, "launch")
    try:
        process = ApiProcess(plan, rundir, secrets or Secrets(), context)
        gc.freeze()
        gc.set_threshold(GARBAGE_EVERY)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(process.serve(beat, launch, rank))
        finally:
            process.close()
    finally:
        launch.close()
        context.destroy()
