"""The scheduler's gauges and totals as the API process shows them."""

from __future__ import annotations

from typing import Final

from srt.messages import GroupUsage, SchedulerStats
from srt.scheduler.request import Phase
from srt.scheduler.state import SchedulerState

REPORT_NS: Final = 100_000_000
"""Shortest time between two reports, unless the scheduler goes idle."""

RATE_NS: Final = 1_000_000_000
"""Time over which the rate of generated tokens is taken."""


class Reporter:
    """Writes a report when there is news and the last one is old enough, and always when the scheduler goes idle."""

    def __init__(self, state: SchedulerState, now_ns: int) -> None:
        self._state = state
        self._told: tuple[int, ...] = ()
        self._told_ns = now_ns - REPORT_NS
        self._idle_since_ns: int | None = now_ns
        self._idle_ns = 0
        self._rate = 0.0
        self._rate_ns = now_ns
        self._rate_tokens = 0

    def report(self, now_ns: int) -> SchedulerStats | None:
        """What has to be told at this moment, if anything."""
        state = self._state
        idle = not state.live and not state.rows
        news = (
            state.totals.steps,
            state.totals.departures,
            state.queue.changes,
            len(state.live),
            *(pool.free for pool in state.cache.pools),
        )
        self._count_idle(idle, now_ns)
        if news == self._told or (not idle and now_ns - self._told_ns < REPORT_NS):
            return None
        self._told, self._told_ns = news, now_ns
        self._measure_rate(idle, now_ns)
        return self._write()

    def _count_idle(self, idle: bool, now_ns: int) -> None:
        if self._idle_since_ns is not None:
            self._idle_ns += now_ns - self._idle_since_ns
        self._idle_since_ns = now_ns if idle else None

    def _measure_rate(self, idle: bool, now_ns: int) -> None:
        """Tokens a second over at least `RATE_NS`; an idle scheduler generates none."""
        tokens, elapsed_ns = self._state.totals.generated_tokens, now_ns - self._rate_ns
        if idle or elapsed_ns >= RATE_NS:
            self._rate = 0.0 if idle else (tokens - self._rate_tokens) * 1e9 / elapsed_ns
            self._rate_ns, self._rate_tokens = now_ns, tokens

    def _write(self) -> SchedulerStats:
        state, totals, tree = self._state, self._state.totals, self._state.cache.tree
        return SchedulerStats(
            running=len(state.rows),
            queued=len(state.queue),
            groups=group_usages(state),
            steps=totals.steps,
            retracted_requests=totals.retracted_requests,
            retracted_input_tokens=totals.retracted_input_tokens,
            retracted_output_tokens=totals.retracted_output_tokens,
            evicted_tokens=tree.evicted[tree.full[0]] * state.cache.page_size,
            cache_queries_tokens=totals.cache_queries_tokens,
            cache_hit_tokens=totals.cache_hit_tokens,
            generated_tokens=totals.generated_tokens,
            leaked_pages=state.cache.leaked(),
            gen_throughput=self._rate,
            idle_s=self._idle_ns / 1e9,
            images_encoded=totals.images_encoded,
            image_cache_hits=totals.image_cache_hits,
            image_batches=totals.image_batches,
            image_encode_s=totals.image_encode_us / 1e6,
            speculation=totals.speculation.counts(),
            retracted_waiting=sum(
                request.retractions > 0 and request.phase is Phase.QUEUED for request in state.live.values()
            ),
            new_token_ratio=state.share,
            cancel_to_free_counts=tuple(totals.cancel_to_free_counts),
            cancel_to_free_s=totals.cancel_to_free_s,
            eviction_counts=tuple(state.cache.eviction_counts),
            eviction_s=state.cache.eviction_ns / 1e9,
            missed_tokens=dict(totals.missed_tokens),
            recorded_bytes=totals.recorded_bytes,
        )


def group_usages(state: SchedulerState) -> tuple[GroupUsage, ...]:
    """Every KV group's pool by who uses it, in tokens. A page that requests read is theirs, also if the tree owns it;
    what is left of the tree is evictable, all of it."""
    size = state.cache.page_size
    usages = []
    for index, group in enumerate(state.cache.groups):
        use = state.cache.usage(index)
        usages.append(
            GroupUsage(
                group.name,
                total_tokens=use.total * size,
                free_tokens=use.free * size,
                request_tokens=use.requests * size,
                tree_tokens=use.evictable * size,
                evictable_tokens=use.evictable * size,
            )
        )
    return tuple(usages)
