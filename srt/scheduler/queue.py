"""Who is next. Ready requests stand in the order of arrival; siblings of a running prefill step aside until it is done.

`fcfs` serves the ready ones in that order. `lpm` looks at the oldest `LPM_WINDOW` of them and takes the longest cached
prefix first; whoever has been overtaken `OVERTAKEN_MAX` times, or has run before, is served before all others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Final

from srt.cache.lease import Lease
from srt.scheduler.request import Request

LPM_WINDOW: Final = 64
OVERTAKEN_MAX: Final = 32


def by_order(request: Request) -> int:
    """Sort key: oldest first."""
    return request.order


class WaitingQueue:
    """Requests in phase QUEUED. `changes` grows with everything that may change who is next."""

    def __init__(self, policy: str) -> None:
        assert policy in ("fcfs", "lpm"), f"there is no schedule policy {policy!r}"
        self._longest_first = policy == "lpm"
        self._ready: list[Request] = []
        self._parked: dict[Lease, list[tuple[int, Request]]] = {}
        self._parked_count = 0
        self.changes = 0

    def __len__(self) -> int:
        return len(self._ready) + self._parked_count

    def add(self, request: Request) -> None:
        """Let a request wait, at its place in the order of arrival."""
        insort(self._ready, request, key=by_order)
        self.changes += 1

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it waits."""
        self.changes += 1
        if self._take_ready(request):
            return
        for lease, siblings in self._parked.items():
            kept = [(pages, sibling) for pages, sibling in siblings if sibling is not request]
            if len(kept) < len(siblings):
                self._parked_count -= 1
                if kept:
                    self._parked[lease] = kept
                else:
                    del self._parked[lease]
                return
        raise AssertionError(f"{request.rid} is not in the queue")

    def _take_ready(self, request: Request) -> bool:
        index = bisect_left(self._ready, request.order, key=by_order)
        if index == len(self._ready) or self._ready[index] is not request:
            return False
        del self._ready[index]
        return True

    def candidates(self, cached_tokens: Callable[[Request], int]) -> Iterator[Request]:
        """Ready requests, next first, as of now. `cached_tokens` tells how much of a request the cache has."""
        if not self._longest_first:
            return iter(self._ready[:])
        window = self._ready[:LPM_WINDOW]
        ranks = {request: (0, 0) if must_not_wait(request) else (1, -cached_tokens(request)) for request in window}
        return iter(sorted(window, key=ranks.__getitem__))

    def admit(self, request: Request) -> None:
        """A candidate gets a row; older ones that it overtook remember it."""
        taken = self._take_ready(request)
        assert taken, f"{request.rid} is not ready"
        if self._longest_first:
            for older in self._ready[: bisect_left(self._ready, request.order, key=by_order)]:
                older.overtaken += 1

    def park(self, request: Request, lease: Lease, pages: int) -> None:
        """Let a candidate wait until `lease` has committed `pages` pages, or ends."""
        taken = self._take_ready(request)
        assert taken, f"{request.rid} is not ready"
        self._parked.setdefault(lease, []).append((pages, request))
        self._parked_count += 1

    def committed(self, lease: Lease) -> None:
        """A row has committed pages: its siblings whose share is complete are ready again."""
        siblings = self._parked.get(lease)
        if siblings is not None:
            self._wake(lease, [(pages, sibling) for pages, sibling in siblings if pages > len(lease.path)])

    def ended(self, lease: Lease) -> None:
        """A row gives its pages back: whoever waited for more is ready again."""
        if lease in self._parked:
            self._wake(lease, [])

    def _wake(self, lease: Lease, still_parked: list[tuple[int, Request]]) -> None:
        kept = {request for _, request in still_parked}
        for _, request in self._parked.pop(lease):
            if request not in kept:
                self._parked_count -= 1
                self.add(request)
        if still_parked:
            self._parked[lease] = still_parked


def must_not_wait(request: Request) -> bool:
    """Whether `lpm` has to serve a request before any longer prefix."""
    return request.retractions > 0 or request.overtaken >= OVERTAKEN_MAX
