"""The worker process over its real sockets."""

from __future__ import annotations

import gzip
import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from srt.errors import ProcessLost
from srt.heartbeat import Heartbeat
from srt.messages import (
    PageUpdate,
    Progress,
    Ready,
    RowStart,
    SamplingSpec,
    StartProfile,
    StepPlan,
    StepResult,
    StopProfile,
    ToLaunch,
    ToScheduler,
    WorkerFault,
)
from srt.wire import Inbox, Outbox
from srt.worker.process import run
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import Steps, plan_for, random_ids

WAIT_MS = 20_000
PROMPT = random_ids(20, 3, 1024)


@dataclass
class Worker:
    """A worker in a thread, and the ends that the rest of the server would hold."""

    checkpoint: Path
    beat: Heartbeat
    launch: Inbox[ToLaunch]
    scheduler: Inbox[ToScheduler]
    plans: Outbox
    raised: list[BaseException] = field(default_factory=list)

    def results(self, count: int) -> list[Any]:
        """The next `count` messages to the scheduler."""
        messages: list[Any] = []
        while len(messages) < count:
            assert self.scheduler.wait(WAIT_MS), "the worker is silent"
            messages += self.scheduler.drain()
        return messages

    def ready(self) -> list[Any]:
        """Messages to launch, up to `Ready`."""
        messages: list[Any] = []
        while not any(isinstance(message, Ready) for message in messages):
            assert self.launch.wait(WAIT_MS), "the worker is silent"
            messages += self.launch.drain()
        return messages


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), vision=False)


@pytest.fixture
def worker(tiny: Path) -> Iterator[Worker]:
    context: zmq.Context[Any] = zmq.Context()
    with tempfile.TemporaryDirectory(prefix="srt-") as rundir:
        directory = Path(rundir)
        launch: Inbox[ToLaunch] = Inbox(context, directory, "launch", ToLaunch)
        scheduler: Inbox[ToScheduler] = Inbox(context, directory, "scheduler", ToScheduler)
        plans = Outbox(context, directory, "worker0")
        worker = Worker(tiny, Heartbeat.detached(), launch, scheduler, plans)

        def serve() -> None:
            try:
                run(plan_for(tiny), directory, 0, worker.beat)
            except ProcessLost as error:
                worker.raised.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        yield worker
        worker.beat.stop()
        thread.join(20)
        assert not thread.is_alive()
        for end in (launch, scheduler, plans):
            end.close()
        context.term()


def first_plan(step: int) -> StepPlan:
    ids = np.array(PROMPT, dtype="<i4").tobytes()
    start = RowStart(0, ids, 0, len(PROMPT), SamplingSpec(temperature=0.0))
    pages = [PageUpdate(group, [0], [0], [2], [1, 2]) for group in range(2)]
    return StepPlan(step, [0], [len(PROMPT)], [True], [start], pages)


def test_plans_sent_ahead_are_answered_in_order_with_greedy_tokens(worker: Worker, tmp_path: Path) -> None:
    worker.ready()
    worker.plans.send(first_plan(5))
    for step in range(6, 10):
        worker.plans.send(StepPlan(step, [0], [1], [True]))
    worker.plans.send(StepPlan(10, [], [], [], freed_rows=[0]))
    results = worker.results(6)
    assert [result.step for result in results] == [5, 6, 7, 8, 9, 10]
    assert results[-1].token_ids == []
    steps = Steps(plan_for(worker.checkpoint), tmp_path)
    steps.add(0, PROMPT)
    assert [result.token_ids[0] for result in results[:-1]] == steps.generate(0, 5)


def test_loading_is_reported_up_to_the_last_byte_before_ready(worker: Worker) -> None:
    messages = worker.ready()
    progress = [message for message in messages if isinstance(message, Progress)]
    assert progress[-1].done_bytes == progress[-1].total_bytes > 0
    assert isinstance(messages[-1], Ready)
    assert "left on disk: mtp" in messages[-1].facts["weights"]


def test_a_plan_out_of_order_is_refused_and_the_scheduler_hears_why(worker: Worker) -> None:
    worker.ready()
    worker.plans.send(first_plan(1))
    worker.plans.send(StepPlan(3, [0], [1], [True]))
    result, fault = worker.results(2)
    assert isinstance(result, StepResult)
    assert isinstance(fault, WorkerFault)
    assert fault.text == "plan 3 came after plan 1, expected 2"
    worker.beat.stop()
    while not worker.raised:
        threading.Event().wait(0.01)
    assert str(worker.raised[0]) == fault.text


def test_a_profile_records_the_steps_that_were_asked_for(worker: Worker, tmp_path: Path) -> None:
    worker.ready()
    worker.plans.send(StartProfile(1, str(tmp_path / "deep"), "some", steps=2))
    worker.plans.send(StartProfile(2, str(tmp_path), "twice", steps=2))
    worker.plans.send(first_plan(1))
    worker.plans.send(StepPlan(2, [0], [1], [True]))
    worker.plans.send(StopProfile(3))
    started, twice, _, _, late = worker.results(5)
    assert (started.ok, started.text) == (True, str(tmp_path / "deep/some-TP-0.trace.json.gz"))
    assert (twice.ok, twice.text) == (False, "a profile is being taken already")
    assert (late.ok, late.text) == (False, "no profile is being taken"), "it ended by itself"
    trace = json.loads(gzip.decompress(Path(started.text).read_bytes()))
    assert any(event.get("name") == "aten::embedding" for event in trace["traceEvents"])


def test_a_profile_without_an_end_is_written_when_it_is_stopped(worker: Worker, tmp_path: Path) -> None:
    worker.ready()
    worker.plans.send(StartProfile(1, str(tmp_path), "open", steps=1000))
    worker.plans.send(StopProfile(2))
    (tmp_path / "file").write_text("")
    worker.plans.send(StartProfile(3, str(tmp_path / "file"), "nowhere", steps=1))
    _, stopped, nowhere = worker.results(3)
    assert stopped.ok
    assert Path(stopped.text).stat().st_size > 0
    assert not nowhere.ok
