"""Answers on their way to clients: request id to stream, and a client that goes away to a `Cancel`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from typing import Final

import msgspec

from srt.api.metrics import Metrics
from srt.api.schema import Request
from srt.api.tickets import ClientGone, Stream, Ticket
from srt.errors import ErrorCode, ServingError
from srt.messages import Cancel, Delta, Failed, Finish, Generate, SamplingParams, TextPrompt
from srt.wire import Outbox

log = logging.getLogger(__name__)

SENT: Final = TextPrompt("")
"""In place of a prompt that was sent with the request before."""
SEED_MASK: Final = (1 << 63) - 1
STALL_S: Final = 60.0
"""A client that takes nothing from a full connection for so long is gone."""


def of_copy(sampling: SamplingParams, copy: int) -> SamplingParams:
    """What the answer of this number to one prompt is drawn with: of a seeded request each has a seed of its own."""
    if not copy or sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + copy) & SEED_MASK)


class Streams:
    """All calls that are being answered."""

    def __init__(self, tokenizer: Outbox, metrics: Metrics) -> None:
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._by_wire_id: dict[str, Stream] = {}
        self._by_name: dict[str, list[Stream]] = {}
        self._tickets: set[Ticket] = set()
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._tickets)

    def open(self, request: Request, prefix: str = "") -> Ticket:
        """Send the prompts of a call to the tokenizer. `prefix` makes the id in the answer out of the name.

        Raises: ServingError DUPLICATE_REQUEST_ID if a request of that name is running.
        """
        for rid in (request.name, *request.rids):
            if rid in self._by_name:
                raise ServingError(ErrorCode.DUPLICATE_REQUEST_ID, f"a request with the rid {rid!r} is running", "rid")
        ticket = Ticket(request, request.name or uuid.uuid4().hex)
        ticket.task = asyncio.current_task()
        received_ns = time.monotonic_ns()
        for index in range(len(request.prompts) * request.copies):
            place, copy = divmod(index, request.copies)
            # A name of the client's choice may come again while the tokenizer still waits for the last one's end.
            name = request.rids[index] if request.rids else f"{ticket.name}_{index}" if request.batch else ticket.name
            wire_id = f"{name}~{next(self._numbers)}" if request.rids else name
            stream = Stream(ticket, index, name, wire_id)
            ticket.streams.append(stream)
            self._by_wire_id[wire_id] = stream
            self._register(ticket, name, [stream])
            self._tokenizer.send(
                Generate(
                    wire_id,
                    SENT if copy else request.prompts[place],
                    of_copy(request.sampling[place], copy),
                    request.stream,
                    request.namespace,
                    images=request.images[place] if request.images and not copy else (),
                    received_ns=received_ns,
                    speculative=request.speculative,
                    repeats=copy > 0,
                )
            )
        request.images.clear()
        ticket.open_streams = len(ticket.streams)
        if request.batch:
            self._register(ticket, ticket.name, ticket.streams)
        if prefix:
            self._register(ticket, prefix + ticket.name, ticket.streams)
        if request.timeout_ms is not None:
            loop = asyncio.get_running_loop()
            ticket.timeout = loop.call_later(request.timeout_ms / 1000, self._expire, ticket)
        self._tickets.add(ticket)
        self._metrics.requests += len(ticket.streams)
        return ticket

    def _register(self, ticket: Ticket, name: str, streams: list[Stream]) -> None:
        if self._by_name.setdefault(name, streams) is streams:
            ticket.names.append(name)

    def close(self, ticket: Ticket) -> None:
        """The handler is done: forget the call and cancel what still runs for it."""
        ticket.unwatch()
        if ticket.timeout is not None:
            ticket.timeout.cancel()
        self._tickets.discard(ticket)
        for name in ticket.names:
            del self._by_name[name]
        for stream in ticket.streams:
            if self._by_wire_id.pop(stream.wire_id, None) is not None:
                self._tokenizer.send(Cancel(stream.wire_id))
                if ticket.client_gone:
                    self._metrics.observe_cancel(stream)

    def deliver(self, deltas: list[Delta]) -> None:
        """Hand deltas to their streams; those of calls that are over are for nobody."""
        now = time.perf_counter()
        by_wire_id, metrics = self._by_wire_id, self._metrics
        for delta in deltas:
            stream = by_wire_id.get(delta.rid)
            if stream is None:
                continue
            if delta.token_ids:
                self._observe_tokens(stream, len(delta.token_ids), now)
            stream.merge(delta)
            if delta.finish is not None:
                del by_wire_id[delta.rid]
                metrics.observe_end(stream, now)
            stream.ticket.touch(stream)

    def _observe_tokens(self, stream: Stream, count: int, now: float) -> None:
        self._metrics.generated_tokens += count
        if not stream.first_at:
            stream.first_at = now
            if stream.ticket.request.stream:
                self._metrics.first_token.observe(now - stream.ticket.started_at)
        elif stream.ticket.request.stream:
            self._metrics.inter_token.observe((now - stream.arrived_at) / count, count)
        stream.arrived_at = now

    def fail(self, failed: Failed) -> None:
        """End a call because one of its prompts cannot be served."""
        stream = self._by_wire_id.pop(failed.rid, None)
        if stream is None:
            return
        request = stream.ticket.request
        param = request.limit_field if failed.param == "max_new_tokens" else failed.param
        stream.ticket.fail(ServingError(failed.code, failed.text, param))

    def _expire(self, ticket: Ticket) -> None:
        """A call has had its time: its requests close with what they have."""
        ticket.timed_out = True
        ticket.abort_text = f"the call took longer than its timeout_ms of {ticket.request.timeout_ms}"
        for stream in ticket.streams:
            if stream.wire_id in self._by_wire_id:
                self._tokenizer.send(Cancel(stream.wire_id))

    def abort(self, name: str, text: str | None) -> None:
        """End the requests of exactly this name; they close with what they have. Unknown names are fine."""
        for stream in self._by_name.get(name, ()):
            stream.ticket.abort_text = text
            if stream.wire_id in self._by_wire_id:
                self._tokenizer.send(Cancel(stream.wire_id))

    def end_all(self, text: str) -> None:
        """Close every stream here and now, and cancel its request."""
        for wire_id in list(self._by_wire_id):
            self._tokenizer.send(Cancel(wire_id))
            self.deliver([Delta(wire_id, finish=Finish("abort", text=text))])

    def drop_stalled(self) -> None:
        """End calls whose client has stopped reading."""
        now = time.perf_counter()
        for ticket in list(self._tickets):
            if ticket.sending_since is not None and now - ticket.sending_since > STALL_S and ticket.task is not None:
                log.warning("request %s: the client read nothing for %.0f s", ticket.name, STALL_S)
                ticket.fail(ClientGone())
                ticket.task.cancel()
