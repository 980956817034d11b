"""A scheduler without a model, on the real sockets: it answers every prompt with its own tokens, again and again."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any, assert_never

import msgspec
import zmq

from srt.errors import ErrorCode
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
    GroupUsage,
    Logprobs,
    LogprobSpec,
    Profiled,
    SchedulerStats,
    StartProfile,
    StepResult,
    StopMatched,
    StopProfile,
    Timing,
    ToScheduler,
    WorkerFault,
)
from srt.wire import Inbox, Outbox

IDLE_MS = 20


class Behaviour(msgspec.Struct):
    """How the fake behaves; tests change it while it runs."""

    step_s: float = 0.0
    tokens_per_step: int = 1
    max_live: int = 1_000_000
    held: bool = False
    """No step is made."""
    replies: dict[tuple[int, ...], list[int]] = {}
    """Answers other than the echo, by prompt."""


class Row(msgspec.Struct):
    """A request that runs."""

    admit: Admit
    tokens: list[int]
    started_ns: int
    sent: int = 0


def numbers(tokens: list[int], wanted: LogprobSpec) -> Logprobs:
    """Made up: a token has -id / 64, the k-th most likely one is k higher and has -k / 8, a listed one -id / 32."""
    return Logprobs(
        array("i", tokens).tobytes(),
        array("f", [-token / 64 for token in tokens]).tobytes(),
        array("i", [token + place for token in tokens for place in range(wanted.top)]).tobytes(),
        array("f", [-place / 8 for _ in tokens for place in range(wanted.top)]).tobytes(),
        array("f", [-token / 32 for _ in tokens for token in wanted.ids]).tobytes(),
    )


class FakeScheduler:
    """Serves until `stopping()`; everything it was told is in `admitted` and `aborted`."""

    def __init__(self, rundir: Path, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.context: zmq.Context[Any] = zmq.Context()
        self.inbox: Inbox[ToScheduler] = Inbox(self.context, rundir, "scheduler", ToScheduler)
        self.tokenizer = Outbox(self.context, rundir, "tokenizer")
        self.rows: dict[str, Row] = {}
        self.admitted: list[Admit] = []
        self.aborted: list[str] = []
        self.matched: list[str] = []
        self.flushed = 0

    def run(self, stopping: Callable[[], bool]) -> None:
        """The loop; returns when `stopping()`, and closes the sockets."""
        while not stopping():
            if not self.rows or self.behaviour.held:
                self.inbox.wait(IDLE_MS)
            for message in self.inbox.drain():
                self.receive(message)
            if self.rows and not self.behaviour.held:
                self.step()
        self.tokenizer.close()
        self.inbox.close()
        self.context.term()

    def receive(self, message: ToScheduler) -> None:
        """The scheduler's protocol."""
        match message:
            case Admit():
                self.admit(message)
            case Abort():
                self.aborted.append(message.rid)
                self.end(message.rid, Finish("abort", text="aborted"))
            case StopMatched():
                self.matched.append(message.rid)
                self.end(message.rid, Finish("stop"))
            case FlushCache():
                self.flushed += not self.rows
                self.tokenizer.send(Done(message.call, not self.rows))
            case AbortAll():
                for rid in list(self.rows):
                    self.end(rid, Finish("abort", text="aborted"))
                self.tokenizer.send(Done(message.call, True))
            case StartProfile():
                self.tokenizer.send(Done(message.call, True, message.directory))
            case StopProfile():
                self.tokenizer.send(Done(message.call, False, "no profile is being taken"))
            case StepResult() | WorkerFault() | Profiled():
                raise AssertionError(message)
            case _:
                assert_never(message)

    def admit(self, message: Admit) -> None:
        """Take a request, or refuse it when there are enough."""
        self.admitted.append(message)
        if len(self.rows) >= self.behaviour.max_live:
            text = f"{len(self.rows)} requests are waiting, the limit is {self.behaviour.max_live}"
            self.tokenizer.send(Failed(message.rid, ErrorCode.OVERLOADED, text))
            return
        prompt = memoryview(message.token_ids).cast("i").tolist()
        reply = self.behaviour.replies.get(tuple(prompt))
        tokens = list(islice(cycle(prompt), message.stop.max_new_tokens)) if reply is None else reply
        self.rows[message.rid] = Row(message, tokens[: message.stop.max_new_tokens], time.monotonic_ns())

    def end(self, rid: str, finish: Finish) -> None:
        """Close a request without a token."""
        if self.rows.pop(rid, None) is not None:
            self.tokenizer.send(Emitted([Emission(rid, finish=finish)]))

    def step(self) -> None:
        """One token, or a few, for every request."""
        if self.behaviour.step_s:
            time.sleep(self.behaviour.step_s)
        emissions = [self.emission(row) for row in self.rows.values()]
        for emission in emissions:
            if emission.finish is not None:
                del self.rows[emission.rid]
        self.tokenizer.send(Emitted(emissions))

    def emission(self, row: Row) -> Emission:
        """The next tokens of a request."""
        stop = row.admit.stop
        prompt_tokens = len(row.admit.token_ids) // 4
        finish, timing = None, None
        tokens: list[int] = []
        for token in row.tokens[row.sent : row.sent + self.behaviour.tokens_per_step]:
            tokens.append(token)
            if token in stop.token_ids:
                finish = Finish("stop", token)
                break
        row.sent += len(tokens)
        if finish is None and row.sent == len(row.tokens):
            finish = Finish("length")
        if finish is not None:
            total_s = (time.monotonic_ns() - row.admit.received_ns) / 1e9
            timing = Timing(tokenized_s=total_s / 8, queue_s=total_s / 4, first_token_s=total_s / 2, total_s=total_s)
        output, prompt = None, None
        wanted = row.admit.sampling.logprobs
        if wanted is not None:
            output = numbers(tokens, wanted) if tokens else None
            if wanted.prompt_from is not None and row.sent == len(tokens):
                ids = memoryview(row.admit.token_ids).cast("i").tolist()
                prompt = numbers(ids[wanted.prompt_from :], wanted)
        cached = (prompt_tokens - 1) // 16 * 16
        return Emission(
            row.admit.rid, tuple(tokens), finish, cached, 0, timing, logprobs=output, prompt_logprobs=prompt
        )

    def report(self, **changes: Any) -> None:
        """Send gauges upwards."""
        pools = (GroupUsage("full", 1000, 900, 60, 40, 30), GroupUsage("sliding", 500, 450, 40, 10, 5))
        stats = SchedulerStats(
            running=len(self.rows), queued=0, groups=pools, cache_queries_tokens=100, cache_hit_tokens=25
        )
        self.tokenizer.send(msgspec.structs.replace(stats, **changes))
