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
from srt.messages import Admit, SpeculationCounts
from srt.scheduler.image_keys import keyed_ids


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
        [settled, computed)  computed by steps in flight, if all their guesses are right
        [computed, …)        still wanted

    `pending` tokens are being sampled by steps in flight, if all their guesses are right. `in_flight` steps name the
    row. What was wrongly guessed is taken off both when a step settles, so their difference is always exact.
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

    __slots__ = ("admitted_ns", "arrived_ns", "cancelled_ns", "first_token_ns", "received_ns")

    def __init__(self, received_ns: int, arrived_ns: int) -> None:
        self.received_ns = received_ns
        self.arrived_ns = arrived_ns
        self.admitted_ns: int | None = None
        self.first_token_ns: int | None = None
        self.cancelled_ns: int | None = None


class Speculation:
    """What guessing ahead has brought a request, in tokens: `steps` that had guesses to check, guesses that were
    checked and that were right, and how many steps had 0, 1, 2, .. right ones; `plain` steps brought a token alone."""

    __slots__ = ("accepted", "drafted", "histogram", "plain", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.drafted = 0
        self.accepted = 0
        self.plain = 0
        self.histogram: list[int] = []

    def observe(self, drafted: int, accepted: int) -> None:
        """A step that brought tokens checked so many guesses, of which the first `accepted` were right."""
        if not drafted:
            self.plain += 1
            return
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        self.histogram.extend([0] * (accepted + 1 - len(self.histogram)))
        self.histogram[accepted] += 1

    def counts(self) -> SpeculationCounts | None:
        """For the wire; None if nothing was guessed."""
        if not self.steps:
            return None
        return SpeculationCounts(self.steps, self.drafted, self.accepted, tuple(self.histogram), self.plain)


class Request:
    """One request. `order` is its place in the order of arrival; `tokens` are all it knows, int32 little-endian,
    as the cache sees them: positions of images hold what `image_keys` draws from their content.

    `limit_tokens`: it ends when so many tokens, prompt included, exist. `after`: the phase that follows DRAINING;
    None before. `overtaken`: younger requests that were admitted before it. `logprobs_from`: the first position of the
    prompt whose log probability is wanted and not there yet; None if there is none.
    """

    __slots__ = (
        "admit",
        "after",
        "cached_tokens",
        "limit_tokens",
        "logprobs_from",
        "order",
        "overtaken",
        "phase",
        "prompt_tokens",
        "retractions",
        "row",
        "speculation",
        "stamps",
        "stop_ids",
        "tokens",
    )

    def __init__(self, admit: Admit, order: int, context_length: int, now_ns: int) -> None:
        self.admit = admit
        self.order = order
        self.tokens = keyed_ids(admit.token_ids, admit.images)
        self.prompt_tokens = len(self.tokens) // 4
        self.limit_tokens = max(self.prompt_tokens, min(self.prompt_tokens + admit.stop.max_new_tokens, context_length))
        self.stop_ids = frozenset(admit.stop.token_ids)
        self.phase = Phase.QUEUED
        self.after: Phase | None = None
        self.row: Row | None = None
        self.cached_tokens = 0
        self.retractions = 0
        self.overtaken = 0
        wanted = admit.sampling.logprobs
        self.logprobs_from = None if wanted is None else wanted.prompt_from
        self.speculation = Speculation()
        self.stamps = Stamps(admit.received_ns or now_ns, now_ns)

    @property
    def rid(self) -> str:
        """Id that the client and the tokenizer know it by."""
        return self.admit.rid

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and what has been accepted of the answer."""
        return len(self.tokens) // 4

    @property
    def reusable(self) -> bytes:
        """The tokens of which cached KV may be used, and one more that is computed in any case.

        A log probability of the prompt needs the step that computes the token before it.
        """
        return bytes(self.tokens) if self.logprobs_from is None else bytes(self.tokens[: 4 * self.logprobs_from])

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

    Known tokens and those being sampled less the ones already granted. A gap that is closed to the last known token
    may be overshot by guesses, which are granted and sampled alike, so that the gap after them is one token again.
    """
    return min(len(request.tokens) // 4 + row.pending, request.target) - row.computed
