"""What takes the role of the api process: its inbox, the way to the tokenizer, and the server seen from here.

The api process puts HTTP before it; `srt.Engine` calls it from Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_never

import zmq

from srt.api.service import Service
from srt.configs.plan import RuntimePlan
from srt.heartbeat import Board
from srt.messages import (
    CallFailed,
    Deltas,
    Detokenized,
    Done,
    Failed,
    SchedulerStats,
    ServerLost,
    ServerReady,
    ToApi,
    Tokenized,
)
from srt.wire import Inbox, Outbox


class Front:
    """One edge of the server's other processes. `lost` is why they have ended, once they have."""

    def __init__(self, plan: RuntimePlan, rundir: Path, context: zmq.Context[Any]) -> None:
        self.inbox: Inbox[ToApi] = Inbox(context, rundir, "api", ToApi)
        self._tokenizer = Outbox(context, rundir, "tokenizer")
        self.service = Service(plan, self._tokenizer, Board.open(rundir))
        self.lost: str | None = None

    def receive(self) -> None:
        """Take in everything that has arrived."""
        for message in self.inbox.drain():
            self._settle(message)

    def _settle(self, message: ToApi) -> None:
        """The protocol of this role."""
        service = self.service
        match message:
            case Deltas():
                service.streams.deliver(message.deltas)
            case Failed():
                service.streams.fail(message)
            case Tokenized() | Detokenized() | Done() | CallFailed():
                service.calls.settle(message)
            case SchedulerStats():
                service.metrics.stats = message
            case ServerReady():
                service.open_for_requests(message.phases)
            case ServerLost():
                self.lost = message.text
            case _:
                assert_never(message)

    def close(self) -> None:
        """Close the sockets."""
        self.service.tracer.close()
        self._tokenizer.close()
        self.inbox.close()
