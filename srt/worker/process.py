"""The worker process: plans in, one step each, results out. Rank 0 answers for all ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import assert_never

import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import SrtError
from srt.heartbeat import Heartbeat
from srt.messages import Phase, Progress, Ready, StartProfile, StepPlan, StopProfile, ToWorker, WorkerFault
from srt.wire import Inbox, Outbox
from srt.worker.grammar_loader import GrammarLoader
from srt.worker.profiling import Profiler
from srt.worker.startup import Engine, start

POLL_MS = 200
"""How often an idle worker looks whether it shall stop."""
PROGRESS_INTERVAL_S = 0.1


def run(plan: RuntimePlan, rundir: Path, rank: int, beat: Heartbeat) -> None:
    """Load the model, say so, then obey plans until `beat.stopping`.

    Raises: StartupError if the model cannot be brought up; ProcessLost if a step fails, after telling the scheduler.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox: Inbox[ToWorker] = Inbox(context, rundir, f"worker{rank}", ToWorker)
    launch = Outbox(context, rundir, "launch")
    scheduler = Outbox(context, rundir, "scheduler")
    loader: GrammarLoader | None = None
    try:
        started = start(plan, rundir, rank, _reporter(launch, rank), ended=_phases(launch, rank))
        loader = None if started.shelf is None else GrammarLoader(context, rundir, rank, started.shelf)
        if plan.server.tp_size > 1:
            _prepare_together(started.runner)
            launch.send(Phase("worker", rank, "graphs", time.monotonic()))
        launch.send(Ready("worker", rank, started.facts, started.memory))
        _serve(started.runner, inbox, scheduler, rank, beat)
    finally:
        if loader is not None:
            loader.close()
        for end in (inbox, launch, scheduler):
            end.close()
        context.term()


def _prepare_together(runner: Engine) -> None:
    """What one rank alone does when it is idle, several do before the first plan.

    Such work has the sums over ranks of a step. Done whenever a rank finds the time, it would meet another rank's plan
    there, and both would add up what does not belong together.
    """
    while runner.unprepared:
        runner.prepare()


def _serve(runner: Engine, inbox: Inbox[ToWorker], scheduler: Outbox, rank: int, beat: Heartbeat) -> None:
    profiler = Profiler(rank)
    steps = _Steps(runner, scheduler, rank, beat)
    while not beat.stopping:
        # A runner that works behind our back is asked again and again: a step is too short to be woken for its end.
        if not inbox.wait(0 if runner.busy or runner.unprepared else POLL_MS):
            profiler.steps_ended(steps.collect())
            if not runner.busy:
                runner.prepare()
            continue
        for message in inbox.drain():
            match message:
                case StepPlan():
                    profiler.steps_ended(steps.submit(message))
                case StartProfile():
                    scheduler.send(profiler.start(message))
                case StopProfile():
                    scheduler.send(profiler.stop(message))
                case _:
                    assert_never(message)


class _Steps:
    """Hands plans to the runner, and results to the scheduler as they are there; both count those that ended."""

    def __init__(self, runner: Engine, scheduler: Outbox, rank: int, beat: Heartbeat) -> None:
        self._runner, self._scheduler, self._rank, self._beat = runner, scheduler, rank, beat
        self._under_way: deque[int] = deque()

    def submit(self, plan: StepPlan) -> int:
        if not self._under_way:
            self._beat.step_begins(plan.step)
        self._under_way.append(plan.step)
        with self._faults_told():
            self._runner.submit(plan)
        return self.collect()

    def collect(self) -> int:
        with self._faults_told():
            results = list(self._runner.finished())
        for result in results:
            self._under_way.popleft()
            if self._rank == 0:
                self._scheduler.send(result)
        if results and self._under_way:
            self._beat.step_begins(self._under_way[0])
        elif results:
            self._beat.step_ended()
        return len(results)

    @contextmanager
    def _faults_told(self) -> Iterator[None]:
        try:
            yield
        except (SrtError, RuntimeError) as error:
            self._scheduler.send(WorkerFault(self._rank, str(error)))
            raise


def _phases(launch: Outbox, rank: int) -> Callable[[str], None]:
    """Tells launch that a phase of the start is over."""
    return lambda name: launch.send(Phase("worker", rank, name, time.monotonic()))


def _reporter(launch: Outbox, rank: int) -> Callable[[int, int], None]:
    """Reports of loaded bytes, the last one always, the others at most every `PROGRESS_INTERVAL_S`."""
    last_s = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if done == total or now_s - last_s >= PROGRESS_INTERVAL_S:
            last_s = now_s
            launch.send(Progress(rank, done, total))

    return report
