"""The estimate of what running requests will still take."""

from __future__ import annotations

import random

from srt.scheduler.outlook import Growth, peak_pages
from tests.scheduler.support import world


def taken(growths: list[Growth], page_size: int) -> int:
    """The peak by letting every request grow token by token until its end, when it gives its new pages back."""
    peak = 0
    for step in range(max(growth.remaining for growth in growths) + 1):
        alive = [growth for growth in growths if growth.remaining >= step]
        peak = max(peak, sum(-(-(growth.missing + step) // page_size) for growth in alive))
    return peak


def test_the_peak_is_never_below_what_requests_take_and_at_most_a_page_each_above() -> None:
    rng = random.Random(1)
    for _ in range(300):
        page_size = rng.choice((1, 4, 16))
        growths = sorted(
            Growth(rng.randrange(100), rng.randrange(1 - page_size, 60)) for _ in range(rng.randrange(1, 12))
        )
        assert taken(growths, page_size) <= peak_pages(growths, page_size) <= taken(growths, page_size) + len(growths)


def test_requests_that_end_one_after_the_other_are_not_counted_as_if_all_ended_last() -> None:
    short_ones, long_one = [Growth(10, 0)] * 9, Growth(100, 0)
    assert peak_pages([*short_ones, long_one], 1) == 100
    assert peak_pages([], 16) == 0


def test_a_hit_that_others_read_costs_nothing() -> None:
    inside = world(page_size=4, window=8, full_pages=40, sliding_pages=40, chunk=128, overlap=False)
    prompt = list(range(100))
    inside.send(prompt, 8)
    inside.deliver()
    inside.send(prompt, 8)
    inside.send([*prompt[:96], *range(200, 230)], 8)
    inside.deliver()
    state = inside.scheduler.state
    assert state.cache.usage(0).requests == 26 + 1 + 8
    assert len(state.running) == 3, "each alone would take 27 pages and more"
    inside.run()
    assert state.totals.retracted_requests == 0


def test_a_hit_that_nobody_reads_costs_its_pages_because_they_can_be_evicted_no_more() -> None:
    inside = world(page_size=4, window=8, full_pages=40, sliding_pages=40, chunk=128, overlap=False)
    inside.scheduler.state.share = 1.0
    prompt = list(range(100))
    inside.send(prompt, 1)
    inside.run()
    inside.send(range(200, 210), 60)  # 18 pages in the end: 15 are free, three more leaves will be evicted
    assert inside.scheduler.state.cache.available(0) == 40 - 3
    waiting = inside.send(prompt, 1)
    assert waiting.rid not in [request.rid for request in inside.scheduler.state.running]
    inside.run()
    assert inside.scheduler.state.totals.retracted_requests == 0
