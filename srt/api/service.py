"""What every endpoint works with: one server's limits, its running calls, its state of life."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import msgspec

from srt.api.bodies import Notice, Parser
from srt.api.calls import Calls
from srt.api.http import Exchange
from srt.api.metrics import Metrics
from srt.api.requestlog import RequestLog
from srt.api.schema import Prompt, Request, Schema
from srt.api.streams import Streams
from srt.api.tickets import Ticket
from srt.api.tracing import make_tracer
from srt.configs.plan import RuntimePlan
from srt.errors import ErrorCode, ServingError
from srt.formats.description import FORMATS, Formats
from srt.heartbeat import Board
from srt.messages import ImageSource, TokenPrompt
from srt.wire import Outbox


class Life(Enum):
    """What the server as a whole is doing."""

    LOADING = auto()
    SERVING = auto()
    DRAINING = auto()


class Service:
    """One server, seen from its HTTP side."""

    def __init__(self, plan: RuntimePlan, tokenizer: Outbox, board: Board) -> None:
        self.plan = plan
        self.board = board
        self.metrics = Metrics()
        self.streams = Streams(tokenizer, self.metrics)
        self.calls = Calls(tokenizer)
        self.formats = Formats(FORMATS.get(plan.reasoning_format), FORMATS.get(plan.call_format))
        self.schema = Schema(
            vocab_size=plan.model.vocab_size,
            context_length=plan.context_length,
            batch_limit=max(1, plan.max_queued_requests + plan.max_running_requests),
            formats=self.formats,
        )
        self.model = plan.server.served_model_name or plan.server.model_path
        self._logs = RequestLog(plan.server)
        self.tracer = make_tracer(plan.server)
        self._model_names = {self.model, plan.server.model_path, plan.model.path, "default", ""}
        self.life = Life.LOADING
        self.started_at = time.time()
        self._started = time.perf_counter()

    def open_for_requests(self, phases: Mapping[str, float]) -> None:
        """Every process is ready; `phases` is how long each phase of the start took, in seconds."""
        if self.life is Life.LOADING:
            self.life = Life.SERVING
            self.metrics.startup_s = time.perf_counter() - self._started
            self.metrics.startup_phases_s = dict(phases)

    def check_alive(self) -> None:
        """Raises: ServingError NOT_READY while the server loads or drains."""
        if self.life is Life.LOADING:
            raise ServingError(ErrorCode.NOT_READY, "the server is loading")
        if self.life is Life.DRAINING:
            raise ServingError(ErrorCode.NOT_READY, "the server is draining")

    def model_named(self, name: str | None) -> str:
        """The model's name, if the client asks for it. Raises: ServingError MODEL_NOT_FOUND if not."""
        if name is not None and name not in self._model_names:
            raise ServingError(
                ErrorCode.MODEL_NOT_FOUND, f"the model {name[:256]!r} does not exist, this is {self.model!r}", "model"
            )
        return self.model

    async def read(self, exchange: Exchange, parser: Parser) -> tuple[Any, tuple[Notice, ...]]:
        """The body of a request that asks for work, and what of it was ignored."""
        self.check_alive()
        raw = await exchange.body(self.plan.server.max_body_bytes)
        body, notices = parser.parse(raw, strict=exchange.headers.get(b"x-strict") == b"1")
        for notice in notices:
            self.metrics.warnings[notice.kind] += 1
        return body, notices

    async def with_ids(self, request: Request) -> Request:
        """The request with its prompts as token ids, if the client wants to see them."""
        if not request.return_ids:
            return request
        prompts = []
        for index, prompt in enumerate(request.prompts):
            prompts.append(await self._as_ids(prompt, request.images[index] if request.images else ()))
        return msgspec.structs.replace(request, prompts=tuple(prompts))

    async def _as_ids(self, prompt: Prompt, images: tuple[ImageSource, ...]) -> TokenPrompt:
        match prompt:
            case TokenPrompt() if not images:
                return prompt
            case _:
                return TokenPrompt(await self.calls.tokenize(prompt, images))

    @contextmanager
    def serve(self, exchange: Exchange, request: Request, prefix: str = "") -> Iterator[Ticket]:
        """Run a call for as long as the block lasts; what is still running at its end is cancelled."""
        self.check_alive()
        ticket = self.streams.open(request, prefix)
        exchange.name(ticket.name)
        ticket.watch(exchange.receive)
        self._logs.received(ticket, exchange.request_id)
        try:
            yield ticket
        finally:
            self.streams.close(ticket)
            self._logs.ended(ticket, exchange.request_id)
            self.tracer.ended(ticket, exchange)
