"""A whole server without sockets, clocks or a model: real scheduler, fake worker, and a ledger of what clients got."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence

import msgspec

from srt.configs.plan import RuntimePlan
from srt.heartbeat import Heartbeat
from srt.messages import (
    Abort,
    Admit,
    Done,
    Emitted,
    Failed,
    Finish,
    ImageSpan,
    Logprobs,
    LogprobSpec,
    SamplingSpec,
    SchedulerStats,
    StepPlan,
    StepResult,
    StopMatched,
    StopSpec,
    ToScheduler,
)
from srt.scheduler.process import Scheduler
from tests.sim.fake_worker import FakeWorker


class Mailbox:
    """The end of an edge that keeps what is sent."""

    def __init__(self) -> None:
        self.messages: deque[msgspec.Struct] = deque()

    def send(self, message: msgspec.Struct) -> None:
        """Keep a message."""
        self.messages.append(message)

    def take(self) -> list[msgspec.Struct]:
        """All messages since the last time."""
        taken = list(self.messages)
        self.messages.clear()
        return taken


class Client:
    """What one client sent and got."""

    def __init__(self, rid: str, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> None:
        self.rid = rid
        self.prompt = list(prompt)
        self.max_new_tokens = max_new_tokens
        self.stop_ids = list(stop_ids)
        self.output: list[int] = []
        self.ending: Finish | Failed | None = None
        self.cached_tokens = 0
        self.retractions = 0
        self.told: list[tuple[int, int]] = []
        """Positions and tokens whose log probabilities came."""
        self.told_from: int | None = None
        """The first position that it wants to be told of; None if it wants nothing."""

    def hear(self, logprobs: Logprobs | None) -> None:
        """Log probabilities, which the fake worker numbers by position."""
        if logprobs is not None:
            positions = map(int, array("f", logprobs.values))
            self.told += zip(positions, array("i", logprobs.token_ids), strict=True)


class World:
    """Drives the scheduler turn by turn; `results` are steps that the worker has done and not yet answered."""

    def __init__(self, plan: RuntimePlan) -> None:
        self.plan = plan
        self.tokenizer, self.worker_inbox = Mailbox(), Mailbox()
        self.scheduler = Scheduler(plan, self.tokenizer, [self.worker_inbox], Heartbeat.detached())
        window = plan.groups[1].window
        assert window is not None
        pages = [group.pages for group in plan.groups]
        self.worker = FakeWorker(plan.page_size, window, pages, plan.max_running_requests, plan.drafting.modules)
        self.worker.context = plan.context_length
        self.results: deque[StepResult] = deque()
        self.clients: dict[str, Client] = {}
        self.sent = 0
        self.live: list[str] = []
        self.steps: list[StepPlan] = []
        self.keep_steps = False
        self.stats: SchedulerStats | None = None
        self.done: list[Done] = []
        self.released: list[str] = []

    def send(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        namespace: str = "",
        images: Sequence[ImageSpan] = (),
        speculative: bool = True,
        logprobs: LogprobSpec | None = None,
    ) -> Client:
        """A request arrives."""
        client, admit = self.write(prompt, max_new_tokens, stop_ids, namespace)
        if logprobs is not None:
            client.told_from = len(prompt) if logprobs.prompt_from is None else logprobs.prompt_from
            admit = msgspec.structs.replace(admit, sampling=SamplingSpec(logprobs=logprobs))
        self.turn(msgspec.structs.replace(admit, images=tuple(images), speculative=speculative))
        return client

    def send_all(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Client]:
        """Several requests arrive between two turns."""
        written = [self.write(prompt, max_new_tokens) for prompt in prompts]
        self.turn(*(admit for _, admit in written))
        return [client for client, _ in written]

    def write(
        self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = (), namespace: str = ""
    ) -> tuple[Client, Admit]:
        """A client and its request, not sent yet."""
        self.sent += 1
        client = Client(f"r{self.sent}", prompt, max_new_tokens, stop_ids)
        self.clients[client.rid] = client
        self.live.append(client.rid)
        packed = b"".join(token.to_bytes(4, "little") for token in prompt)
        stop = StopSpec(max_new_tokens, tuple(stop_ids))
        return client, Admit(client.rid, packed, SamplingSpec(), stop, namespace)

    def abort(self, client: Client) -> None:
        """The client goes away."""
        self.turn(Abort(client.rid))

    def stop_matched(self, client: Client) -> None:
        """The tokenizer found a stop text."""
        self.turn(StopMatched(client.rid))

    def deliver(self) -> bool:
        """The oldest step's result comes back, if one is out."""
        if not self.results:
            return False
        self.worker.answered()
        self.turn(self.results.popleft())
        return True

    def turn(self, *messages: ToScheduler) -> None:
        """One turn of the scheduler's loop; what it sends arrives at once."""
        self.scheduler.turn(messages)
        for step in self.worker_inbox.take():
            assert isinstance(step, StepPlan)
            if self.keep_steps:
                self.steps.append(step)
            self.results.append(self.worker.execute(step))
        for message in self.tokenizer.take():
            match message:
                case Emitted(emissions=emissions, released=released):
                    self.released += released
                    held = {request.rid for request in self.scheduler.state.rows.values()}
                    assert held.isdisjoint(released), "a row still looks at images that were released"
                    for emission in emissions:
                        client = self.clients[emission.rid]
                        assert client.ending is None, f"{client.rid} hears something after its end"
                        client.output.extend(emission.token_ids)
                        client.hear(emission.prompt_logprobs)
                        client.hear(emission.logprobs)
                        client.cached_tokens = emission.cached_tokens
                        client.retractions = emission.retractions
                        if emission.finish is not None:
                            self.end(client, emission.finish)
                case Failed(rid=rid):
                    self.end(self.clients[rid], message)
                case SchedulerStats():
                    self.stats = message
                case Done():
                    self.done.append(message)
                case _:
                    raise AssertionError(f"the tokenizer does not understand {message}")

    def end(self, client: Client, ending: Finish | Failed) -> None:
        """A request ends, once."""
        assert client.ending is None, f"{client.rid} ends twice"
        client.ending = ending
        self.live.remove(client.rid)

    def run(self, steps: int = 100_000) -> None:
        """Deliver results until nothing is left to do.

        Raises: AssertionError if requests are left and nothing moves, or after so many steps.
        """
        for _ in range(steps):
            if not self.deliver():
                self.turn()  # after a row has given way to itself the next turn starts it again
                if not self.results:
                    break
        assert not self.live, f"stuck with {self.live}"
        assert not self.scheduler.state.rows, "a row is still held"
