"""The worker process: plans in, one step each, results out. Rank 0 answers for all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from srt.worker.runner import Runner
from srt.worker.startup import start

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
        launch.send(Ready("worker", rank, started.facts, started.memory))
        _serve(started.runner, inbox, scheduler, rank, beat)
    finally:
        if loader is not None:
            loader.close()
        for end in (inbox, launch, scheduler):
            end.close()
        context.term()


def _serve(runner: Runner, inbox: Inbox[ToWorker], scheduler: Outbox, rank: int, beat: Heartbeat) -> None:
    profiler = Profiler(rank)
    while not beat.stopping:
        if not inbox.wait(POLL_MS):
            continue
        for message in inbox.drain():
            match message:
                case StepPlan():
                    _step(runner, message, scheduler, rank, beat)
                    profiler.step_ended()
                case StartProfile():
                    scheduler.send(profiler.start(message))
                case StopProfile():
                    scheduler.send(profiler.stop(message))
                case _:
                    assert_never(message)


def _step(runner: Runner, plan: StepPlan, scheduler: Outbox, rank: int, beat: Heartbeat) -> None:
    beat.step_begins(plan.step)
    try:
        result = runner.step(plan)
    except (SrtError, RuntimeError) as error:
        scheduler.send(WorkerFault(rank, str(error)))
        raise
    beat.step_ended()
    if rank == 0:
        scheduler.send(result)


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
