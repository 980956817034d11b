"""What the scheduler knows. Planner, settling and the life of requests are functions over this one object."""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from srt.cache.prefix import PrefixCache
from srt.configs.plan import RuntimePlan
from srt.messages import CANCEL_TO_FREE_BOUNDS_S, Failed
from srt.scheduler.depth import DepthControl
from srt.scheduler.queue import WaitingQueue, by_order
from srt.scheduler.request import Request, Row, Speculation

FIRST_SHARE: Final = 0.5


class Limits(NamedTuple):
    """The numbers of a `RuntimePlan` that the scheduler obeys; see there."""

    context_length: int
    max_running_requests: int
    max_queued_requests: int
    chunked_prefill_size: int
    max_step_tokens: int
    steps_in_flight: int


class Grant(NamedTuple):
    """What one step does for one row. `drafts` guesses at most are checked, beyond the `tokens`."""

    request: Request
    row: Row
    tokens: int
    emits: bool
    drafts: int = 0


class Flight(NamedTuple):
    """A step that has been sent and whose result is not back."""

    step: int
    grants: list[Grant]

    @property
    def decodes(self) -> bool:
        """Whether it does nothing but one token, and guesses, for each row."""
        return all(grant.tokens == 1 and grant.emits for grant in self.grants)


@dataclass(slots=True)
class Totals:
    """What only ever grows."""

    steps: int = 0
    departures: int = 0
    """Times that a row gave its pages back."""
    retracted_requests: int = 0
    retracted_input_tokens: int = 0
    retracted_output_tokens: int = 0
    cache_queries_tokens: int = 0
    cache_hit_tokens: int = 0
    generated_tokens: int = 0
    images_encoded: int = 0
    image_cache_hits: int = 0
    image_batches: int = 0
    image_encode_us: int = 0
    speculation: Speculation = field(default_factory=Speculation)
    cancel_to_free_counts: list[int] = field(default_factory=lambda: [0] * (len(CANCEL_TO_FREE_BOUNDS_S) + 1))
    cancel_to_free_s: float = 0.0
    missed_tokens: Counter[str] = field(default_factory=Counter)
    recorded_bytes: int = 0


@dataclass(slots=True)
class SchedulerState:
    """All requests, rows and pages.

    `live`: requests that have not been closed, by id. `running`: those in phase RUNNING, oldest first. `rows`: whoever
    holds a row, RUNNING or DRAINING. `freed_rows`: rows given up that the worker has not been told of. `released`:
    ended requests whose images the tokenizer has not been told may go. `failed`: errors that it has not been told.
    `share`: part of its `max_new_tokens` that a request is expected to use, learned from those that ended. `blocked`:
    what the world looked like when the next request last did not fit.
    """

    limits: Limits
    cache: PrefixCache
    queue: WaitingQueue
    free_rows: deque[int]
    live: dict[str, Request] = field(default_factory=dict)
    running: list[Request] = field(default_factory=list)
    rows: dict[int, Request] = field(default_factory=dict)
    freed_rows: list[int] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    flights: deque[Flight] = field(default_factory=deque)
    depth: DepthControl = field(default_factory=lambda: DepthControl(0))
    totals: Totals = field(default_factory=Totals)
    arrivals: int = 0
    share: float = FIRST_SHARE
    blocked: tuple[int, int] | None = None

    @classmethod
    def from_plan(cls, plan: RuntimePlan, clock_ns: Callable[[], int] | None = None) -> SchedulerState:
        """An empty scheduler for what start-up resolved. `clock_ns` is for metrics alone: nothing is decided by it."""
        cache = PrefixCache(
            plan.groups,
            plan.page_size,
            share=not plan.server.disable_radix_cache,
            guessing=1 if plan.drafting.modules else 0,
            look_ahead=plan.drafting.look_ahead,
            clock_ns=clock_ns or (lambda: 0),
        )
        limits = Limits(
            plan.context_length,
            plan.max_running_requests,
            plan.max_queued_requests,
            plan.chunked_prefill_size,
            plan.max_step_tokens,
            plan.steps_in_flight,
        )
        queue, rows = WaitingQueue(plan.server.schedule_policy), deque(range(plan.max_running_requests))
        return cls(limits, cache, queue, rows, depth=DepthControl(plan.drafting.drafts))

    @property
    def draining(self) -> int:
        """Rows whose pages come back when the steps that name them have settled."""
        return len(self.rows) - len(self.running)

    def start(self, request: Request, row: Row) -> None:
        """A request takes a row."""
        request.row = row
        self.rows[row.index] = request
        insort(self.running, request, key=by_order)
