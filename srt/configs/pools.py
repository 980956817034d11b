"""How many pages each KV group gets: arithmetic in whole pages, the null page of every pool counted.

The full pool is the unit of thought. A sliding pool is as large as the full one where memory allows: then whatever is
cached in full can keep its window. It is never smaller than what one request needs: its window, the chunks in flight
and two pages of rounding.
"""

from __future__ import annotations

from typing import Final

import msgspec

from srt.configs.memory import ITEM_BYTES
from srt.configs.plan import KVGroupSpec
from srt.configs.startup_table import human
from srt.errors import StartupError

CPU_KV_BYTES: Final = 512 << 20
"""KV memory on a CPU unless one context needs more; touched only as far as it is used."""


class Limits(msgspec.Struct, frozen=True):
    """Sizes in tokens that follow from flags and checkpoint, before memory is looked at."""

    context: int
    running: int
    chunk: int
    in_flight: int


class Pools(msgspec.Struct, frozen=True):
    """Pages of each group's pool by name, without null pages; tokens of the full pool; and why it is as large."""

    pages: dict[str, int]
    full_tokens: int
    reason: str


class PoolRequest(msgspec.Struct, frozen=True):
    """What `plan_pools` works from. `room` is bytes for KV over all ranks."""

    groups: tuple[KVGroupSpec, ...]
    dtype: str
    page_size: int
    limits: Limits
    room: int
    usual: int | None
    """Bytes that are enough unless one context needs more; None: all the room."""
    asked_tokens: int | None
    asked_ratio: float | None

    def page_bytes(self, group: KVGroupSpec) -> int:
        """Bytes of K and V of one page over all layers of a group and all ranks."""
        return self.page_size * 2 * len(group.layers) * group.kv_heads * group.head_dim * ITEM_BYTES[self.dtype]

    @property
    def windowed(self) -> tuple[KVGroupSpec, ...]:
        """Groups that see a window only."""
        return tuple(group for group in self.groups if group.window is not None)

    @property
    def full_bytes(self) -> int:
        """Bytes of one page in every group without a window."""
        return sum(self.page_bytes(group) for group in self.groups if group.window is None)

    @property
    def sliding_bytes(self) -> int:
        """Bytes of one page in every windowed group."""
        return sum(self.page_bytes(group) for group in self.windowed)

    @property
    def null_bytes(self) -> int:
        """Bytes of the null pages, one a pool."""
        return self.full_bytes + self.sliding_bytes

    @property
    def usable(self) -> int:
        """Bytes for pages that can be given out."""
        return self.room - self.null_bytes

    def needed(self, group: KVGroupSpec, full_pages: int) -> int:
        """Pages of a windowed pool without which one request cannot run."""
        assert group.window is not None
        tokens = group.window + self.limits.in_flight * self.limits.chunk
        return min(full_pages, -(-tokens // self.page_size) + 2)

    def sliding_pages(self, full_pages: int) -> dict[str, int]:
        """Pages of the windowed pools beside a full pool of `full_pages`."""
        if self.asked_ratio is not None:
            return {group.name: max(1, int(full_pages * self.asked_ratio)) for group in self.windowed}
        if not self.windowed:
            return {}
        affordable = (self.usable - full_pages * self.full_bytes) // self.sliding_bytes
        return {group.name: min(full_pages, max(self.needed(group, full_pages), affordable)) for group in self.windowed}


def plan_pools(request: PoolRequest) -> Pools:
    """Pages of every pool.

    Raises: StartupError with both numbers if what was asked for does not fit, or cannot serve one request.
    """
    full, reason = _full_pages(request)
    sliding = request.sliding_pages(full)
    _check_windows(request, full, sliding)
    needed = full * request.full_bytes
    needed += sum(sliding[group.name] * request.page_bytes(group) for group in request.windowed)
    if needed > request.usable:
        both = max(0, request.usable) // (request.full_bytes + request.sliding_bytes) * request.page_size
        raise StartupError(
            f"{full * request.page_size} tokens of KV need {human(needed)}, {human(max(0, request.usable))} are left "
            + (f"after the weights; --max-total-tokens {both} would fit" if both else "after the weights")
        )
    pages = {group.name: sliding.get(group.name, full) for group in request.groups}
    return Pools(pages=pages, full_tokens=full * request.page_size, reason=reason)


def _full_pages(request: PoolRequest) -> tuple[int, str]:
    """Pages of the full pool: as asked, else from the usual KV memory, else enough for one context."""
    page = request.page_size
    if request.asked_tokens is not None:
        if request.asked_tokens < page:
            raise StartupError(f"--max-total-tokens is {request.asked_tokens}; one page holds {page} tokens")
        return request.asked_tokens // page, "--max-total-tokens"
    ratio = 1.0 if request.asked_ratio is None else request.asked_ratio
    budget = request.room if request.usual is None else min(request.room, request.usual)
    usual = int((budget - request.null_bytes) / (request.full_bytes + request.sliding_bytes * ratio))
    context = -(-request.limits.context // page)
    if usual >= context:
        return usual, f"{human(budget)} for KV"
    if request.asked_ratio is None:
        least = sum(request.page_bytes(group) * request.needed(group, context) for group in request.windowed)
        fitting = (request.usable - least) // max(1, request.full_bytes)
    else:
        fitting = int(request.usable / (request.full_bytes + request.sliding_bytes * ratio))
    full = max(1, usual, min(context, fitting))
    return full, "one context" if full == context else f"{human(max(0, request.usable))} left after the weights"


def _check_windows(request: PoolRequest, full: int, sliding: dict[str, int]) -> None:
    limits = request.limits
    for group in request.windowed:
        pages, needed = sliding[group.name], request.needed(group, full)
        if pages < needed:
            raise StartupError(
                f"--swa-full-tokens-ratio {request.asked_ratio} gives the {group.name} pool "
                f"{pages * request.page_size} tokens; one request needs {needed * request.page_size} there "
                f"(window {group.window}, {limits.in_flight} chunks of {limits.chunk}, two pages)"
            )
