"""A request and the four phases of its life; the table `NEXT` is the whole state machine.

    QUEUED ──▶ RUNNING ──▶ DRAINING ──▶ FINISHED
      │  ▲                    │
      │  └──── retracted ─────┘
      └──▶ FINISHED (refused, or cancelled while it waits)

A request holds a row and pages exactly while it is RUNNING or DRAINING.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from srt.cache.lease import Lease
from srt.messages import Admit


class Phase(Enum):
    """Where a request is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    DRAINING = "draining"
    FINISHED = "finished"


NEXT: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.QUEUED: frozenset({Phase.RUNNING, Phase.FINISHED}),
    Phase.RUNNING: frozenset({Phase.DRAINING}),
    Phase.DRAINING: frozenset({Phase.QUEUED, Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}


class Row:
    """A request's place in the worker, in tokens:

        [0, settled)         computed by steps whose results are here
        [settled, computed)  computed by steps in flight
        [computed, …)        still wanted

    `pending` tokens are being sampled by steps in flight. `in_flight` steps name the row.
    """

    __slots__ = ("computed", "in_flight", "index", "lease", "pending", "settled")

    def __init__(self, index: int, lease: Lease, computed: int) -> None:
        self.index = index
        self.lease = lease
        self.computed = computed
        self.settled = computed
        self.pending = 0
        self.in_flight = 0


class Stamps:
    """When things happened, in `time.monotonic_ns()`; None until they did."""

    __slots__ = ("admitted_ns", "cancelled_ns", "first_token_ns", "received_ns")

    def __init__(self, received_ns: int) -> None:
        self.received_ns = received_ns
        self.admitted_ns: int | None = None
        self.first_token_ns: int | None = None
        self.cancelled_ns: int | None = None


class Request:
    """One request. `order` is its place in the order of arrival; `tokens` are all it knows, int32 little-endian.

    `limit_tokens`: it ends when so many tokens, prompt included, exist. `after`: the phase that follows DRAINING;
    None before. `overtaken`: younger requests that were admitted before it.
    """

    __slots__ = (
        "admit",
        "after",
        "cached_tokens",
        "limit_tokens",
        "order",
        "overtaken",
        "phase",
        "prompt_tokens",
        "retractions",
        "row",
        "stamps",
        "stop_ids",
        "tokens",
    )

    def __init__(self, admit: Admit, order: int, context_length: int, now_ns: int) -> None:
        self.admit = admit
        self.order = order
        self.tokens = bytearray(admit.token_ids)
        self.prompt_tokens = len(self.tokens) // 4
        self.limit_tokens = max(self.prompt_tokens, min(self.prompt_tokens + admit.stop.max_new_tokens, context_length))
        self.stop_ids = frozenset(admit.stop.token_ids)
        self.phase = Phase.QUEUED
        self.after: Phase | None = None
        self.row: Row | None = None
        self.cached_tokens = 0
        self.retractions = 0
        self.overtaken = 0
        self.stamps = Stamps(admit.received_ns or now_ns)

    @property
    def rid(self) -> str:
        """Id that the client and the tokenizer know it by."""
        return self.admit.rid

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and what has been accepted of the answer."""
        return len(self.tokens) // 4

    @property
    def target(self) -> int:
        """Tokens whose KV this request will ever need: all but the last one sampled, which nobody reads."""
        return max(self.limit_tokens - 1, self.prompt_tokens)

    def move(self, phase: Phase) -> None:
        """Enter a phase.

        Raises: AssertionError if the table has no such transition.
        """
        assert phase in NEXT[self.phase], f"{self.rid} cannot go from {self.phase.value} to {phase.value}"
        self.phase = phase


def gap(request: Request, row: Row) -> int:
    """Tokens that a row could compute now. Chunked prefill, prefix hits and decode are this one number.

    Known tokens, those being sampled (and, with a drafter, its drafts) less the ones already granted.
    """
    return min(len(request.tokens) // 4 + row.pending, request.target) - row.computed
