"""What the scheduler reports, and when."""

from __future__ import annotations

from srt.messages import Finish, GroupUsage, StepResult
from srt.scheduler.planner import plan_step
from srt.scheduler.stats import REPORT_NS, Reporter
from tests.scheduler.support import world
from tests.sim.world import World


def usage(inside: World, group: int) -> GroupUsage:
    """The last reported usage of a group."""
    assert inside.stats is not None
    return inside.stats.groups[group]


def test_an_idle_scheduler_has_reported_that_requests_hold_nothing() -> None:
    inside = world(page_size=4, full_pages=50, sliding_pages=50)
    for start in range(5):
        inside.send(range(start, start + 30), 7)
    inside.run()
    assert inside.stats is not None
    assert (inside.stats.running, inside.stats.queued, inside.stats.gen_throughput) == (0, 0, 0.0)
    assert inside.stats.generated_tokens == 35
    assert inside.stats.leaked_pages == 0
    for group in range(2):
        use = usage(inside, group)
        assert use.request_tokens == 0
        assert use.evictable_tokens == use.tree_tokens > 0
        assert use.free_tokens + use.request_tokens + use.tree_tokens == use.total_tokens == 200


def test_usage_counts_shared_pages_once_and_as_the_requests_while_they_are_read() -> None:
    inside = world(page_size=4, full_pages=50, sliding_pages=50, window=100, chunk=64, overlap=False)
    inside.send(range(41), 1)
    inside.run()
    inside.send(range(41), 9)
    inside.send(range(41), 9)
    inside.deliver()
    inside.scheduler._reporter = Reporter(inside.scheduler.state, 0)
    inside.turn()
    use = usage(inside, 0)
    assert (use.request_tokens, use.tree_tokens, use.evictable_tokens) == (12 * 4, 0, 0)


def test_reports_come_at_most_every_tenth_of_a_second_and_only_with_news() -> None:
    inside = world(overlap=False)
    reporter = Reporter(inside.scheduler.state, 0)
    assert reporter.report(0) is not None
    assert reporter.report(10 * REPORT_NS) is None, "no news"
    inside.send([1, 2, 3], 50)
    assert reporter.report(11 * REPORT_NS) is not None
    inside.deliver()
    assert reporter.report(12 * REPORT_NS - 1) is None, "too early"
    assert reporter.report(12 * REPORT_NS) is not None


def test_going_idle_is_reported_at_once() -> None:
    inside = world(overlap=False)
    reporter = Reporter(inside.scheduler.state, 0)
    inside.send([1, 2, 3], 1)
    assert reporter.report(REPORT_NS) is not None
    inside.deliver()
    report = reporter.report(REPORT_NS + 1)
    assert report is not None and report.running == 0
    assert reporter.report(2 * REPORT_NS + 1) is None


def test_idle_time_and_the_rate_of_tokens_are_measured() -> None:
    inside = world(overlap=False)
    second = 10 * REPORT_NS
    reporter = Reporter(inside.scheduler.state, 0)
    inside.send([1, 2, 3], 50)
    first = reporter.report(3 * second)
    assert first is not None and first.idle_s == 3.0
    for _ in range(20):
        inside.deliver()
    later = reporter.report(5 * second)
    assert later is not None
    assert (later.idle_s, later.gen_throughput) == (3.0, 10.0)
    assert later.steps == 21


def test_what_recorded_steps_hold_is_told_on() -> None:
    inside = world(overlap=False)
    inside.send([1, 2, 3], 2)
    inside.turn(StepResult(1, [5], [1], 1, recorded_bytes=4096))
    reporter = Reporter(inside.scheduler.state, 0)
    report = reporter.report(REPORT_NS)
    assert report is not None and report.recorded_bytes == 4096


def test_hits_queries_and_evictions_are_counted_in_tokens() -> None:
    inside = world(page_size=4, full_pages=12, sliding_pages=12)
    for start in (0, 0, 1000):
        inside.send(range(start, start + 41), 1)
        inside.run()
    assert inside.stats is not None
    assert (inside.stats.cache_queries_tokens, inside.stats.cache_hit_tokens) == (123, 40)
    assert inside.stats.evicted_tokens == (10 + 11 - 12) * 4
    assert inside.stats.missed_tokens == {"absent": 80, "tombstone": 0, "page_rounding": 3}
    assert sum(inside.stats.eviction_counts) > 0


def test_the_time_from_a_cancel_to_free_pages_is_counted_once_for_each_cancelled_request() -> None:
    inside = world(rows=1, overlap=True)
    running, waiting, finished = inside.send([1, 2, 3], 50), inside.send([4, 5, 6], 50), inside.send([7], 1)
    inside.abort(waiting)
    counts = inside.scheduler.state.totals.cancel_to_free_counts
    assert counts[0] == sum(counts) == 1, "one that waits holds nothing"
    inside.abort(running)
    assert sum(counts) == 1, "steps in flight still name its row"
    inside.run()
    assert sum(counts) == 2
    assert finished.ending == Finish("length")
    assert inside.stats is not None
    assert inside.stats.cancel_to_free_counts == tuple(counts)
    assert inside.stats.cancel_to_free_s == inside.scheduler.state.totals.cancel_to_free_s > 0


def test_a_plan_without_work_is_no_step() -> None:
    inside = world()
    assert plan_step(inside.scheduler.state, 0) is None
    assert inside.scheduler.state.totals.steps == 0
