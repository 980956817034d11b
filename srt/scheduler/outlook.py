"""How many pages the running requests will still take: the estimate behind admission.

A request is expected to use a share of its `max_new_tokens`, learned from those that ended. In a sliding group it soon
has its window and stays there. In a full group its pages grow with the answer and are free again when it ends, so what
counts is the highest point on the way, not the sum of all ends: whenever a request ends, those that outlive it have
grown by as many tokens as it still had to.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from srt.cache.lease import Match
from srt.cache.radix import window_pages
from srt.scheduler.request import Request
from srt.scheduler.state import SchedulerState


class Growth(NamedTuple):
    """In tokens: how far a request will grow, and how much of what it has already lacks a page (less what is spare)."""

    remaining: int
    missing: int


class Outlook:
    """What the running requests will take, and whether another one fits beside them."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self._growths: list[Growth] = []
        self._window_pages = [0] * len(state.cache.groups)
        for request in state.running:
            self.add(request)

    def add(self, request: Request) -> None:
        """Count on a running request."""
        assert request.row is not None, "a running request has a row"
        lease = request.row.lease
        insort(self._growths, self._growth(request, lease.pages))
        for group, window in enumerate(self._state.cache.tree.windows):
            if window is not None:
                self._window_pages[group] += max(0, self._window(request, window) - lease.held(group))

    def fits(self, request: Request, match: Match) -> bool:
        """Whether a request can start without any, most likely, having to be retracted for it.

        Alone it always can: what could not was refused when it arrived.
        """
        state, cache = self._state, self._state.cache
        if not state.rows:
            return True
        for group, window in enumerate(cache.tree.windows):
            room = cache.available(group) - cache.idle_pages(match, group)
            if window is None:
                growths = self._growths.copy()
                insort(growths, self._growth(request, len(match.path)))
                needed = peak_pages(growths, cache.page_size)
            else:
                own = max(0, self._window(request, window) - cache.hit_pages(match, group))
                needed = self._window_pages[group] + own
            if needed > room:
                return False
        return True

    def _growth(self, request: Request, pages: int) -> Growth:
        return Growth(self._length(request) - request.known, request.known - pages * self._state.cache.page_size)

    def _length(self, request: Request) -> int:
        """Tokens with KV that a request is expected to end with; a page more than it has, once it has outgrown that."""
        likely = request.prompt_tokens + int(self._state.share * (request.limit_tokens - request.prompt_tokens))
        return max(request.known, min(request.target, max(likely, request.known + self._state.cache.page_size)))

    def _window(self, request: Request, window: int) -> int:
        """Pages of a sliding group that a request holds at its most, besides those of a chunk under way."""
        size = self._state.cache.page_size
        return min(-(-self._length(request) // size), window_pages(window, size) + 2)


def peak_pages(growths: list[Growth], page_size: int) -> int:
    """The most pages that requests will have taken together at any time; `growths` in ascending order.

    When a request ends, each that outlives it has grown as many tokens as it has, begun pages counted whole.
    """
    peak = missing = 0
    for survivors, growth in enumerate(reversed(growths), 1):
        missing += growth.missing
        peak = max(peak, missing + survivors * (growth.remaining + page_size - 1))
    return peak // page_size
