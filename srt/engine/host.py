"""A server whose api role this process plays: its directory, its processes, and a thread that talks to them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop
import zmq

from srt.api.app import Gate
from srt.api.auth import Secrets
from srt.api.front import Front
from srt.api.service import Life
from srt.configs.server import ServerConfig
from srt.engine.call import Call, Response
from srt.errors import ErrorCode, ProcessLost, ServingError, StartupError
from srt.heartbeat import Board, Heartbeat, process_name
from srt.launch.rundir import private_directory, write_plan
from srt.launch.start import make_plan
from srt.launch.supervisor import make_board

T = TypeVar("T")

POLL_S: Final = 0.1
GOODBYE_S: Final = 20.0
"""How long the processes of the server may take to end before they are killed."""


class Host:
    """One server, from construction to `close`. Its methods may be called from any thread but the host's own.

    Raises: StartupError if the server cannot start as asked.
    """

    def __init__(self, server: ServerConfig) -> None:
        self.plan = make_plan(server)
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended = threading.Event()
        self._lost: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._work, name="srt-engine", daemon=True)
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:  # also a Ctrl-C: nothing is left behind
            self.close()
            raise

    # --- called from other threads -------------------------------------------------------------------------

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the host's loop. Raises: ProcessLost if the server has ended."""
        if self._ended.is_set() or self._loop is None:
            work.close()
            raise ProcessLost(self._lost or "the engine is shut down")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Stop the server: running calls end first, for as long as `drain_timeout` allows. Twice does no harm."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    # --- on the host's loop --------------------------------------------------------------------------------

    async def call(self, method: str, path: str, body: bytes) -> Response:
        """One call, answered whole. Raises: ProcessLost if the server ends before the answer does."""
        call = self._begin(method, path, body)
        try:
            return await self._unless_lost(call.response())
        finally:
            call.leave()

    async def events(self, path: str, body: bytes) -> AsyncIterator[dict[str, Any]]:
        """One call, its events as they come. Raises: ServingError; ProcessLost as `call`."""
        call = self._begin("POST", path, body)
        events = call.events()
        try:
            while (event := await self._unless_lost(_next(events))) is not None:
                yield event
        finally:
            call.leave()

    def _begin(self, method: str, path: str, body: bytes) -> Call:
        call = Call(method, path, body)
        call.begin(self._gate)
        return call

    async def _unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._loss}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        raise ProcessLost(self._lost or "the engine is shut down")

    # --- the thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with private_directory() as rundir, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(rundir))
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._ended.set()
            if not self._ready.done():
                self._ready.set_exception(StartupError(self._lost or "the engine was shut down while it started"))

    async def _serve(self, rundir: Path) -> None:
        """Start the processes, play the api's role until told to stop or they are lost, end them."""
        loop = asyncio.get_running_loop()
        self._stop, self._loss = asyncio.Event(), loop.create_future()
        self._loop = loop
        write_plan(rundir, self.plan)
        make_board(self.plan, rundir)
        heart = Heartbeat.attach(Board.open(rundir), process_name("api"))
        context: zmq.Context[Any] = zmq.Context()
        front = Front(self.plan, rundir, context)
        self._gate = Gate(front.service, Secrets())
        loop.add_reader(front.inbox.fileno(), front.receive)
        command = [sys.executable, "-m", "srt.launch.hosted", str(rundir)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            await self._watch(front, process)
            await self._drain(front)
        finally:
            self._lost = self._lost or "the engine is shut down"
            self._ended.set()
            self._loss.set_result(None)
            await asyncio.sleep(0)  # those who wait for answers hear of it
            loop.remove_reader(front.inbox.fileno())
            front.close()
            await asyncio.to_thread(_end, process)
            heart.close()
            context.destroy()

    async def _watch(self, front: Front, process: subprocess.Popen[bytes]) -> None:
        assert self._stop is not None
        while not self._stop.is_set():
            front.receive()
            if front.service.life is Life.SERVING and not self._ready.done():
                self._ready.set_result(None)
            if process.poll() is not None or front.lost is not None:
                front.receive()  # its last words may have arrived since
                self._lost = front.lost or f"the server's processes ended with status {process.poll()}"
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._stop.wait()

    async def _drain(self, front: Front) -> None:
        """Let running calls end, unless there is nobody left to answer them."""
        service = front.service
        service.life = Life.DRAINING
        if self._lost is not None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.plan.server.drain_timeout):
                while len(service.streams):
                    await asyncio.sleep(POLL_S)
        service.streams.end_all("the engine is shutting down")


async def _next(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(events, None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let go of the leash; the processes die with their supervisor if that does not end by itself."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(GOODBYE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def encoded(body: Any) -> bytes:
    """A body as JSON. Raises: ServingError if a number is none; TypeError if something has no JSON form."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise ServingError(ErrorCode.INVALID_REQUEST, f"the body is no JSON: {error}") from error
