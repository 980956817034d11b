"""The scheduler's process: receive, plan, send, answer; and again. The clock and the sockets end here."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final, Protocol, assert_never

import msgspec
import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import ProcessLost, ServingError
from srt.heartbeat import Heartbeat
from srt.messages import (
    Abort,
    AbortAll,
    Admit,
    Done,
    Emission,
    Emitted,
    Failed,
    Finish,
    FlushCache,
    Profiled,
    Ready,
    StartProfile,
    StepPlan,
    StepResult,
    StopMatched,
    StopProfile,
    ToScheduler,
    WorkerFault,
)
from srt.scheduler.life import arrive, close
from srt.scheduler.planner import plan_step
from srt.scheduler.profile import ProfileCalls
from srt.scheduler.settle import settle
from srt.scheduler.state import SchedulerState
from srt.scheduler.stats import Reporter
from srt.wire import Inbox, Outbox

log = logging.getLogger(__name__)

POLL_MS: Final = 100
"""Longest sleep: what the loop does without being asked is at most so late."""

GC_OBJECTS: Final = 50_000
"""Objects between two garbage collections. Evicted nodes die by reference count; a full collection of a large tree
would stop the loop for tens of milliseconds."""


class Sender(Protocol):
    """The end of an edge that takes messages."""

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; never blocks."""


def run(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat) -> None:
    """Serve until asked to stop.

    Raises: ProcessLost if a worker fails, answers what it was not asked, or does not answer in time.
    """
    gc.freeze()
    gc.set_threshold(GC_OBJECTS, 50, 100)
    with ExitStack() as stack:
        context: zmq.Context[Any] = stack.enter_context(zmq.Context())
        inbox: Inbox[ToScheduler] = stack.enter_context(closing(Inbox(context, rundir, "scheduler", ToScheduler)))

        def outbox(name: str) -> Outbox:
            return stack.enter_context(closing(Outbox(context, rundir, name)))

        workers = [outbox(f"worker{index}") for index in range(plan.server.tp_size)]
        scheduler = Scheduler(plan, outbox("tokenizer"), workers, beat)
        outbox("launch").send(Ready("scheduler", rank))
        while not beat.stopping:
            inbox.wait(POLL_MS)
            scheduler.turn(inbox.drain())


class Scheduler:
    """One turn of the loop after the other, over one state."""

    def __init__(self, plan: RuntimePlan, tokenizer: Sender, workers: Sequence[Sender], beat: Heartbeat) -> None:
        self.state = SchedulerState.from_plan(plan, time.perf_counter_ns)
        self._watchdog_s = plan.server.watchdog_timeout
        self._tokenizer = tokenizer
        self._workers = workers
        self._beat = beat
        self._now_ns = self._step_since_ns = time.monotonic_ns()
        self._reporter = Reporter(self.state, self._now_ns)
        self._emissions: list[Emission] = []
        self._replies: list[msgspec.Struct] = []
        self._flushes: list[int] = []
        self._profiles = ProfileCalls(len(workers))
        self._leaked = 0

    def turn(self, messages: Sequence[ToScheduler]) -> None:
        """Receive what has come, plan, send, answer."""
        self._now_ns = time.monotonic_ns()
        for message in messages:
            self._receive(message)
        for step in self._plan():
            self._send(step)
        self._answer()
        self._watch()

    def _receive(self, message: ToScheduler) -> None:
        match message:
            case Admit():
                self._admit(message)
            case Abort():
                self._end(message.rid, Finish("abort"))
            case StopMatched():
                self._end(message.rid, Finish("stop"))
            case AbortAll():
                self._end_all(message.call)
            case FlushCache():
                self._flushes.append(message.call)
            case StartProfile() | StopProfile() | Profiled():
                self._profile(message)
            case StepResult():
                self._settle(message)
            case WorkerFault():
                raise ProcessLost(f"worker {message.rank} failed: {message.text}")
            case _:
                assert_never(message)

    def _admit(self, message: Admit) -> None:
        try:
            arrive(self.state, message, self._now_ns)
        except ServingError as error:
            self._replies.append(Failed(message.rid, error.code, error.text, error.param))

    def _end(self, rid: str, finish: Finish) -> None:
        """End a request if it lives; one that has ended meanwhile has had its closing."""
        request = self.state.live.get(rid)
        if request is not None:
            self._emissions.append(close(self.state, request, finish, self._now_ns))

    def _end_all(self, call: int) -> None:
        rids = list(self.state.live)
        for rid in rids:
            self._end(rid, Finish("abort"))
        self._replies.append(Done(call, ok=True, text=f"{len(rids)} requests ended"))

    def _profile(self, message: StartProfile | StopProfile | Profiled) -> None:
        match message:
            case StartProfile() | StopProfile():
                for worker in self._workers:
                    worker.send(message)
            case Profiled():
                done = self._profiles.take(message)
                if done is not None:
                    self._replies.append(done)
            case _:
                assert_never(message)

    def _settle(self, result: StepResult) -> None:
        self._emissions += settle(self.state, result, self._now_ns)
        self._mark_step()
        leaked = self.state.cache.leaked()
        if leaked != self._leaked:
            log.error("%d KV pages belong to nobody after step %d", leaked, result.step)
            self._leaked = leaked

    def _plan(self) -> Iterator[StepPlan]:
        """Steps that can be sent now: as many as may be in flight, while there is work."""
        while (step := plan_step(self.state, self._now_ns)) is not None:
            yield step

    def _send(self, step: StepPlan) -> None:
        for worker in self._workers:
            worker.send(step)
        if len(self.state.flights) == 1:
            self._mark_step()

    def _mark_step(self) -> None:
        """Another step is now the oldest in flight, or none is: its age counts from here."""
        self._step_since_ns = self._now_ns
        if self.state.flights:
            self._beat.step_begins(self.state.flights[0].step)
        else:
            self._beat.step_ended()

    def _answer(self) -> None:
        if self._emissions or self.state.released:
            self._tokenizer.send(Emitted(self._emissions, self.state.released))
            self._emissions, self.state.released = [], []
        for failed in self.state.failed:
            self._tokenizer.send(failed)
        self.state.failed.clear()
        if self._flushes:
            self._flush()
        for reply in self._replies:
            self._tokenizer.send(reply)
        self._replies.clear()
        report = self._reporter.report(self._now_ns)
        if report is not None:
            self._tokenizer.send(report)

    def _flush(self) -> None:
        """Answer flushes: no while a request lives, yes when no row is left; rows of closed requests are waited for."""
        state = self.state
        if state.live:
            text = f"{len(state.running)} requests run and {len(state.queue)} wait; flushing needs an idle server"
            self._replies += [Done(call, ok=False, text=text) for call in self._flushes]
        elif not state.rows:
            tokens = state.cache.flush()
            self._replies += [Done(call, ok=True, text=f"{tokens} cached tokens dropped") for call in self._flushes]
        else:
            return
        self._flushes.clear()

    def _watch(self) -> None:
        overdue_s = (self._now_ns - self._step_since_ns) / 1e9
        if self.state.flights and overdue_s > self._watchdog_s:
            step, limit_s = self.state.flights[0].step, self._watchdog_s
            raise ProcessLost(f"step {step} has not come back for {overdue_s:.1f} s (watchdog_timeout {limit_s:g} s)")
