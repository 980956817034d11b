"""Starts the processes of a server, watches them, and stops them in order.

    starting ──all Ready──▶ serving ──SIGTERM·SIGINT──▶ draining ──all ended──▶ exit 0
        │                      │                            │
        └───────── a child ends, is silent, hangs ──────────┘──▶ kill the rest, say why in one line, exit 1

A second signal kills everything at once. Children are the leaders of sessions of their own: a terminal's Ctrl-C
reaches `launch` alone, which then stops the others in the order of the requests' way down, so that every part can
still reach the one below it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Final, NoReturn, assert_never

import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import ProcessLost
from srt.heartbeat import Board, Heartbeat, process_name
from srt.launch.report import LoadProgress, show_table
from srt.launch.waterfall import StartReport
from srt.messages import Fatal, Phase, Progress, Ready, ServerLost, ServerReady, ToLaunch
from srt.wire import LINGER_MS, Inbox, Outbox

STOP_ORDER: Final = ("api", "tokenizer", "scheduler", "worker")
STOP_TIMEOUT_S: Final = 5.0
"""A process that has nothing left to wait for ends within this, or is killed."""
TICK_MS: Final = 100
LAST_WORDS_MS: Final = 100
"""How long to wait for the `Fatal` of a process that has ended."""

logger = logging.getLogger(__name__)


class Child:
    """One process of the server."""

    def __init__(self, role: str, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.role = role
        self.name = process_name(role, rank)
        self.process = process
        self.ready = False
        self.stopping = False

    @classmethod
    def spawn(cls, entry: str, role: str, rank: int, rundir: Path, environment: Mapping[str, str]) -> Child:
        """Start a process of module `entry`, as the leader of a session of its own."""
        command = [sys.executable, "-m", entry, role, str(rank), str(rundir)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        return cls(role, rank, process)

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Let it finish what it has begun, and end."""
        self.stopping = True
        self.process.terminate()

    def kill(self) -> None:
        """End it now, with everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def lost(self) -> bool:
        """Whether the process ended without being asked to, or badly."""
        return not self.running and (not self.stopping or self.process.returncode != 0)

    def end(self, words: str | None) -> str:
        """How the process ended, for a person; `words` is what it said itself."""
        status = self.process.poll()
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        elif words is not None:
            how = "failed"
        else:
            how = f"ended with status {status}"
        return f"{self.name} (pid {self.process.pid}) {how}" + (f": {words}" if words else "")


def make_board(plan: RuntimePlan, rundir: Path) -> None:
    """The board of a server, with a slot for each of its processes, whoever has the api's role."""
    workers = (process_name("worker", rank) for rank in range(plan.server.tp_size))
    roles = (process_name(role) for role in ("launch", "api", "tokenizer", "scheduler"))
    Board.create(rundir, [*roles, *workers])


class Supervisor:
    """The processes of one server. Children see `environment`; the api process sees `secrets` too.

    With an `owner`, another program has the api's role: there is no api process, the program's end of that pipe being
    closed is as good as a signal to stop, and it is told when the server is lost. `begun_s` is when the command began,
    by the machine's monotonic clock.
    """

    def __init__(
        self,
        plan: RuntimePlan,
        rundir: Path,
        environment: Mapping[str, str],
        secrets: Mapping[str, str],
        entry: str = "srt.launch.child",
        owner: BinaryIO | None = None,
        begun_s: float | None = None,
    ) -> None:
        self._plan, self._owner = plan, owner
        roles = [("tokenizer", 0), ("scheduler", 0), *(("worker", rank) for rank in range(plan.server.tp_size))]
        if owner is None:
            roles.insert(0, ("api", 0))
            make_board(plan, rundir)
        self._board = Board.open(rundir)
        self._heart = Heartbeat.attach(self._board, process_name("launch"))
        self._context: zmq.Context[Any] = zmq.Context()
        self._inbox: Inbox[ToLaunch] = Inbox(self._context, rundir, "launch", ToLaunch)
        self._to_api = Outbox(self._context, rundir, "api")
        self._signals: list[int] = []
        self._last_words: dict[str, str] = {}
        self._progress = LoadProgress()
        spawned_s = time.monotonic()
        self._start = StartReport(plan, spawned_s if begun_s is None else begun_s, spawned_s)
        self._obey_signals()
        self._children = {
            process_name(role, rank): Child.spawn(
                entry, role, rank, rundir, {**environment, **secrets} if role == "api" else environment
            )
            for role, rank in roles
        }

    def run(self, when_ready: Callable[[], None]) -> int:
        """Serve until a signal or a loss; returns the exit status. `when_ready` is called when all can work."""
        try:
            self._watch_until(lambda: all(child.ready for child in self._children.values()))
            self._progress.close()
            if not self._signals:
                self._open(when_ready)
                self._watch_until(lambda: False)
                self._drain()
        except ProcessLost as lost:
            logger.error("%s; the server stops", lost)
            if self._owner is not None:
                self._to_api.send(ServerLost(str(lost)))
            return 1
        finally:
            self._end_all()
        return 128 + self._signals[-1] if len(self._signals) > 1 else 0

    # --- watching ---------------------------------------------------------------------------------------

    def _watch_until(self, done: Callable[[], bool]) -> None:
        """Go on until `done`, or until somebody asks the server to stop. Raises: ProcessLost."""
        while not done() and not self._signals:
            self._tick()

    def _tick(self) -> None:
        self._inbox.wait(TICK_MS)
        if self._owner is not None and not self._signals and select.select([self._owner], [], [], 0)[0]:
            self._signals.append(signal.SIGTERM)  # nothing is ever written to it: it is closed
        self._read_inbox()
        if self._last_words or any(child.lost for child in self._children.values()):
            self._raise_lost()
        self._check_board()

    def _read_inbox(self) -> None:
        for message in self._inbox.drain():
            match message:
                case Ready():
                    self._note_ready(message)
                case Phase():
                    self._start.phase(process_name(message.role, message.rank), message.name, message.at_s)
                case Progress():
                    self._progress.update(message.rank, message.done_bytes, message.total_bytes)
                case Fatal():
                    self._last_words.setdefault(process_name(message.role, message.rank), message.text)
                case _:
                    assert_never(message)

    def _note_ready(self, message: Ready) -> None:
        self._children[process_name(message.role, message.rank)].ready = True
        self._start.ready(message, time.monotonic())

    def _raise_lost(self) -> NoReturn:
        """Name the process that was the cause: a killed one, else the first that said why, else any that ended.

        Where one process is killed others may soon fail for want of it, so they get a moment to show up together.
        """
        self._inbox.wait(LAST_WORDS_MS)
        self._read_inbox()
        lost = [child for child in self._children.values() if child.lost]
        killed = [child for child in lost if child.process.returncode < 0]
        spoken = [self._children[name] for name in self._last_words]
        cause = [*killed, *spoken, *lost][0]
        raise ProcessLost(cause.end(self._last_words.get(cause.name)))

    def _check_board(self) -> None:
        limit_s = self._plan.server.watchdog_timeout
        for age in self._board.ages():
            if age.name not in self._children:
                continue
            if age.beat_s is not None and age.beat_s > limit_s:
                raise ProcessLost(f"{age.name} (pid {age.pid}) has given no sign of life for {age.beat_s:.0f} s")
            if age.step_s is not None and age.step_s > limit_s:
                raise ProcessLost(f"{age.name} (pid {age.pid}) has been in step {age.step} for {age.step_s:.0f} s")

    def _open(self, when_ready: Callable[[], None]) -> None:
        """Let the API process take requests, and say so."""
        start, form = self._start, self._plan.server.log_format
        self._to_api.send(ServerReady(start.phases()))
        if self._owner is None or logger.isEnabledFor(logging.INFO):
            for title, rows in start.tables():
                show_table(title, rows, form)
        when_ready()

    # --- stopping ---------------------------------------------------------------------------------------

    def _obey_signals(self) -> None:
        def note(signum: int, frame: FrameType | None) -> None:
            self._signals.append(signum)

        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, note)

    def _drain(self) -> None:
        """Stop role after role, the requests' way down. Raises: ProcessLost if one fails or hangs."""
        logger.info("%s: finishing what is running", signal.Signals(self._signals[0]).name)
        for role in STOP_ORDER:
            children = [child for child in self._children.values() if child.role == role]
            patience_s = STOP_TIMEOUT_S + (self._plan.server.drain_timeout if role == "api" else 0)
            deadline = time.monotonic() + patience_s
            for child in children:
                child.ask_to_stop()
            while len(self._signals) < 2 and any(child.running for child in children):
                if time.monotonic() > deadline:
                    names = ", ".join(child.name for child in children if child.running)
                    raise ProcessLost(f"{names} did not stop within {patience_s:g} s")
                self._tick()
            if any(child.lost for child in children):
                self._raise_lost()

    def _end_all(self) -> None:
        """Leave nothing behind: no process, no socket."""
        self._progress.close()
        for child in self._children.values():
            child.kill()
        self._heart.close()
        self._context.destroy(linger=0 if self._owner is None else LINGER_MS)
