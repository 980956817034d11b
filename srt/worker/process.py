"""The worker process: plans in, one step each, results out. Rank 0 answers for all ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import SrtError
from srt.heartbeat import Heartbeat
from srt.messages import Progress, Ready, StepPlan, ToWorker, WorkerFault
from srt.wire import Inbox, Outbox
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
    try:
        started = start(plan, rundir, rank, _reporter(launch, rank))
        launch.send(Ready("worker", rank, started.facts))
        _serve(started.runner, inbox, scheduler, rank, beat)
    finally:
        for end in (inbox, launch, scheduler):
            end.close()
        context.term()


def _serve(runner: Engine, inbox: Inbox[StepPlan], scheduler: Outbox, rank: int, beat: Heartbeat) -> None:
    """Hand plans to the runner as they come and results to the scheduler as they are there.

    A runner that works behind our back is asked again and again: a step takes about as long as the system would need
    to wake us.
    """
    under_way: deque[int] = deque()
    while not beat.stopping:
        plans = inbox.drain() if inbox.wait(0 if runner.busy else POLL_MS) else []
        try:
            for plan in plans:
                if not under_way:
                    beat.step_begins(plan.step)
                under_way.append(plan.step)
                runner.submit(plan)
            results = list(runner.finished())
        except (SrtError, RuntimeError) as error:
            scheduler.send(WorkerFault(rank, str(error)))
            raise
        for result in results:
            under_way.popleft()
            if rank == 0:
                scheduler.send(result)
        if results and under_way:
            beat.step_begins(under_way[0])
        elif results:
            beat.step_ended()


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
