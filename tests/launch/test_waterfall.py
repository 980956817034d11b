"""How a start is told: phases as bars, and memory beside its plan."""

from __future__ import annotations

import msgspec

from srt.launch.waterfall import StartReport
from srt.messages import Ready
from tests.support.resolved import make_plan

PLAN = msgspec.structs.replace(make_plan(), memory={"weights: text": 1000, "KV: full": 2000})


def report() -> StartReport:
    """A start of 10 s: 2 s of planning; one worker takes 4 s for its weights, the other 1 s."""
    start = StartReport(PLAN, begun_s=100.0, spawned_s=102.0)
    for rank, loaded_s in ((0, 105.0), (1, 108.0)):
        start.phase(f"srt:worker[{rank}]", "imports", 104.0)
        start.phase(f"srt:worker[{rank}]", "weights", loaded_s)
        start.ready(Ready("worker", rank, {"threads": "2"}, {"weights: text": 500, "KV: full": 900}), loaded_s + 2)
    return start


def test_bars_stand_where_their_phase_was() -> None:
    rows = {row.name: (row.value, row.reason) for row in report().waterfall()}
    assert rows["launch plan"] == ("2.00 s", "|######                          |")
    assert rows["srt:worker[0] weights"] == ("1.00 s", "|             ###                |")
    assert rows["srt:worker[1] ready"] == ("2.00 s", "|                          ######|")


def test_a_phase_too_short_to_be_seen_is_left_out() -> None:
    start = report()
    start.phase("srt:api", "imports", 102.01)
    assert all(not row.name.startswith("srt:api") for row in start.waterfall())


def test_the_phases_are_those_of_the_worker_that_was_ready_last() -> None:
    assert report().phases() == {"plan": 2.0, "imports": 2.0, "weights": 4.0, "ready": 2.0}


def test_memory_of_all_ranks_stands_beside_the_plan_and_what_is_off_is_marked() -> None:
    rows = {row.name: (row.value, row.reason) for row in report().memory()}
    assert rows["weights: text"] == ("1000 B", "planned 1000 B, +0.0%")
    assert rows["KV: full"] == ("1.8 KiB", "planned 2.0 KiB, -10.0%  <-- off")


def test_facts_say_after_how_long_each_process_was_ready() -> None:
    facts = [(row.name, row.value, row.reason) for row in report().facts()]
    assert facts == [("srt:worker[0]", "5.00 s", "threads: 2"), ("srt:worker[1]", "8.00 s", "threads: 2")]
