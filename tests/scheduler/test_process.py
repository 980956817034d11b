"""The scheduler's process over its real sockets, between a tokenizer and a worker that the test plays."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from srt.configs.plan import RuntimePlan
from srt.errors import ProcessLost
from srt.heartbeat import Heartbeat
from srt.messages import (
    Abort,
    AbortAll,
    Admit,
    Done,
    Emitted,
    Finish,
    FlushCache,
    Profiled,
    Ready,
    SamplingSpec,
    SchedulerStats,
    StepPlan,
    StopSpec,
    ToLaunch,
    ToTokenizer,
    ToWorker,
    WorkerFault,
)
from srt.scheduler import process
from srt.scheduler.process import Scheduler
from srt.scheduler.profile import ProfileCalls
from srt.wire import Inbox, Outbox
from tests.cache.support import packed
from tests.scheduler.support import world
from tests.sim.fake_worker import FakeWorker, answer
from tests.sim.world import Mailbox
from tests.support.plans import runtime_plan

M = TypeVar("M", bound=msgspec.Struct)


class Server:
    """Everything around the scheduler's process, which runs in a thread."""

    def __init__(self, directory: Path, plan: RuntimePlan) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.tokenizer: Inbox[ToTokenizer] = Inbox(self.context, directory, "tokenizer", ToTokenizer)
        self.launch: Inbox[ToLaunch] = Inbox(self.context, directory, "launch", ToLaunch)
        self.worker: Inbox[ToWorker] = Inbox(self.context, directory, "worker0", ToWorker)
        self.scheduler = Outbox(self.context, directory, "scheduler")
        self.fake = FakeWorker(4, 8, [64, 64], 8)
        self.beat = Heartbeat.detached()
        self.error: BaseException | None = None
        self.heard: list[msgspec.Struct] = []
        self.unread: deque[msgspec.Struct] = deque()
        self.thread = threading.Thread(target=self.run, args=(plan, directory))
        self.thread.start()

    def run(self, plan: RuntimePlan, directory: Path) -> None:
        """The body of the thread."""
        try:
            process.run(plan, directory, 0, self.beat)
        except ProcessLost as error:
            self.error = error

    def work(self) -> None:
        """Answer the plans that have come."""
        for plan in self.worker.drain():
            assert isinstance(plan, StepPlan)
            self.scheduler.send(self.fake.execute(plan))
            self.fake.answered()

    def hear(self, kind: type[M], timeout_s: float = 10.0) -> M:
        """Work until a message of this kind comes; keep all that come."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.work()
            self.tokenizer.wait(1)
            fresh = self.tokenizer.drain()
            self.heard.extend(fresh)
            self.unread.extend(fresh)
            while self.unread:  # what came with it is for the next to ask
                message = self.unread.popleft()
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} in {timeout_s} s")

    def tokens(self, rid: str) -> list[int]:
        """All tokens heard of a request."""
        emitted = [message for message in self.heard if isinstance(message, Emitted)]
        return [token for message in emitted for one in message.emissions if one.rid == rid for token in one.token_ids]

    def close(self) -> None:
        """Stop the process, then the sockets."""
        self.beat.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()
        for end in (self.tokenizer, self.launch, self.worker, self.scheduler):
            end.close()
        self.context.term()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, runtime_plan())
    yield made
    made.close()


def admit(rid: str, tokens: int = 10, new_tokens: int = 5) -> Admit:
    """A request for the first so many numbers."""
    return Admit(rid, packed(range(tokens)), SamplingSpec(), StopSpec(new_tokens))


def test_the_process_says_ready_serves_and_stops_within_the_poll(server: Server) -> None:
    assert server.launch.wait(5_000)
    assert server.launch.drain() == [Ready("scheduler", 0)]
    server.scheduler.send(admit("a"))
    while len(server.tokens("a")) < 5:
        server.hear(Emitted)
    assert server.tokens("a") == answer(range(10), 5, 8)
    began = time.monotonic()
    server.beat.stop()
    server.thread.join(5)
    assert time.monotonic() - began < 1.0
    assert server.error is None


def test_going_idle_is_told_without_being_asked(server: Server) -> None:
    server.scheduler.send(admit("a"))
    report = server.hear(SchedulerStats)
    while report.generated_tokens < 5 or report.running:
        report = server.hear(SchedulerStats)
    assert report.groups[0].request_tokens == 0


def test_flushing_is_refused_while_a_request_lives_and_done_when_none_does(server: Server) -> None:
    server.scheduler.send(admit("a", new_tokens=200))
    server.hear(Emitted)
    server.scheduler.send(FlushCache(1))
    refused = server.hear(Done)
    assert refused == Done(1, ok=False, text="1 requests run and 0 wait; flushing needs an idle server")
    server.scheduler.send(Abort("a"))
    server.scheduler.send(FlushCache(2))
    flushed = server.hear(Done)
    assert (flushed.call, flushed.ok) == (2, True)
    assert flushed.text.endswith(" cached tokens dropped")


def test_aborting_all_closes_every_request_before_it_says_done(server: Server) -> None:
    for number in range(12):  # eight run, four wait
        server.scheduler.send(admit(f"r{number}", new_tokens=200))
    server.hear(Emitted)
    server.scheduler.send(AbortAll(7))
    assert server.hear(Done) == Done(7, ok=True, text="12 requests ended")
    closed = [
        emission.rid
        for message in server.heard
        if isinstance(message, Emitted)
        for emission in message.emissions
        if emission.finish == Finish("abort")
    ]
    assert sorted(closed) == sorted(f"r{number}" for number in range(12))


def test_a_worker_s_fault_ends_the_process_with_its_sentence(server: Server) -> None:
    server.scheduler.send(WorkerFault(1, "out of memory"))
    server.thread.join(5)
    assert str(server.error) == "worker 1 failed: out of memory"


def test_a_step_that_does_not_come_back_ends_the_process(tmp_path: Path) -> None:
    silent = Server(tmp_path, runtime_plan(watchdog_s=0.2))
    silent.scheduler.send(admit("a"))
    silent.thread.join(5)
    silent.close()
    sentence = str(silent.error)
    assert sentence.startswith("step 1 has not come back for 0.")
    assert sentence.endswith(" s (watchdog_timeout 0.2 s)")


class Beats(Heartbeat):
    """Remembers which step was reported as begun, and None for idle."""

    def __init__(self) -> None:
        self.signs: list[int | None] = []
        super().__init__(memoryview(bytearray(64)).cast("q"))

    def step_begins(self, step: int) -> None:
        self.signs.append(step)

    def step_ended(self) -> None:
        self.signs.append(None)


def test_the_board_shows_the_oldest_step_in_flight() -> None:
    beat, worker = Beats(), FakeWorker(4, 8, [64, 64], 8)
    inbox = Mailbox()
    scheduler = Scheduler(runtime_plan(), Mailbox(), [inbox], beat)
    scheduler.turn([admit("a", new_tokens=3)])
    waiting = inbox.take()
    while waiting:
        step = waiting.pop(0)
        assert isinstance(step, StepPlan)
        scheduler.turn([worker.execute(step)])
        waiting += inbox.take()
    assert beat.signs == [1, 2, 3, None]


def test_a_flush_waits_for_the_rows_of_requests_that_have_ended() -> None:
    inside = world()
    client = inside.send(range(20), 50)
    inside.turn(Abort(client.rid), FlushCache(3))
    assert inside.done == [], "a step in flight still reads the pages"
    inside.run()
    assert [(done.call, done.ok) for done in inside.done] == [(3, True)]
    assert all(pool.free == pool.total for pool in inside.scheduler.state.cache.pools)


def test_every_rank_gets_the_same_plans() -> None:
    ranks = [Mailbox(), Mailbox()]
    scheduler = Scheduler(runtime_plan(), Mailbox(), ranks, Heartbeat.detached())
    scheduler.turn([admit("a")])
    first, second = (rank.take() for rank in ranks)
    assert first == second
    assert len(first) == 2


def test_a_leak_is_reported_once_and_in_the_stats(caplog: pytest.LogCaptureFixture) -> None:
    inside = world(overlap=False)
    inside.send(range(10), 4)
    inside.scheduler.state.cache.pools[0].take(1)  # a page that nobody will ever give back
    inside.run()
    assert [record.getMessage() for record in caplog.records] == ["1 KV pages belong to nobody after step 1"]
    assert inside.stats is not None and inside.stats.leaked_pages == 1


def test_a_profile_is_answered_once_when_every_rank_has() -> None:
    calls = ProfileCalls(2)
    assert calls.take(Profiled(1, 1, ok=True, text="b")) is None
    assert calls.take(Profiled(2, 0, ok=False, text="full disk")) is None
    assert calls.take(Profiled(1, 0, ok=True, text="a")) == Done(1, ok=True, text="a\nb")
    assert calls.take(Profiled(2, 1, ok=True, text="b")) == Done(2, ok=False, text="full disk")
