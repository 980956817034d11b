"""What a step does for whom."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest

import srt.scheduler.planner as planner
from srt.messages import StepPlan
from srt.scheduler.planner import plan_step
from tests.scheduler.support import held, last_step, world
from tests.sim.fake_worker import answer
from tests.sim.world import World


def counts(inside: World) -> dict[int, int]:
    """Tokens that the last step grants, by row."""
    step = last_step(inside)
    return dict(zip(step.rows, step.counts, strict=True))


def test_a_prompt_is_computed_in_chunks_and_only_its_last_one_emits() -> None:
    inside = world(chunk=16, overlap=False)
    inside.send(range(40), 2)
    inside.run()
    assert [(step.counts, step.emits) for step in inside.steps] == [
        ([16], [False]),
        ([16], [False]),
        ([8], [True]),
        ([1], [True]),
    ]


@pytest.mark.parametrize("right", [0, 1])
def test_a_prompt_is_shown_to_the_drafter_unless_that_is_never_right(right: int) -> None:
    inside = world(drafts=3, overlap=False)
    for _ in range(40):  # slow either way, so that decodes do without
        inside.scheduler.state.depth.observe(1, 3, 1 + right, 100, 0)
        inside.scheduler.state.depth.observe(1, 0, 1, 10, 0)
    inside.send(range(12), 4)
    assert (counts(inside), last_step(inside).guess) == ({0: 12}, bool(right))
    inside.deliver()
    assert (counts(inside), last_step(inside).guess) == ({0: 1}, False)


def test_decodes_come_first_then_prefills_oldest_first_then_the_queue() -> None:
    inside = world(chunk=16, step_tokens=20, overlap=False, radix=False)
    decoding = inside.send([1], 10)
    inside.send(range(40), 2)
    inside.send(range(50, 90), 2)
    inside.deliver()
    assert counts(inside) == {0: 1, 1: 16, 2: 3}
    inside.deliver()
    assert counts(inside) == {0: 1, 1: 16, 2: 3}
    inside.deliver()
    assert counts(inside) == {0: 1, 1: 8, 2: 11}
    assert len(decoding.output) == 3


def test_a_step_never_grants_more_than_its_budget() -> None:
    inside = world(chunk=7, step_tokens=9, rows=8)
    for start in range(12):
        inside.send(range(start, start + 30), 4)
    inside.run()
    assert max(sum(step.counts) for step in inside.steps) == 9
    assert max(max(step.counts) for step in inside.steps) == 7


def test_a_decode_is_planned_before_the_token_that_it_computes_is_known() -> None:
    inside = world()
    client = inside.send([1, 2, 3], 5)
    assert len(inside.results) == 2, "two steps in flight"
    assert client.output == []
    assert [(step.counts, step.emits) for step in inside.steps] == [([3], [True]), ([1], [True])]


def test_nothing_is_planned_beyond_the_limit_of_new_tokens_even_ahead_of_results() -> None:
    inside = world()
    client = inside.send([1, 2, 3], 2)
    inside.run()
    assert client.output == answer([1, 2, 3], 2, 8)
    assert [step.counts for step in inside.steps] == [[3], [1]]
    assert inside.worker.computed_tokens == 4, "the last token is not computed"


def test_a_request_for_no_tokens_computes_its_prompt_and_ends_by_length() -> None:
    inside = world()
    client = inside.send(range(20), 0)
    inside.run()
    assert client.output == []
    assert client.ending is not None and client.ending.kind == "length"  # type: ignore[union-attr]
    assert [step.emits for step in inside.steps] == [[False], [False]]
    assert inside.send(range(20), 1).rid
    inside.run()
    assert inside.worker.computed_tokens == 20 + 4


def test_the_context_length_ends_an_answer() -> None:
    inside = world(context=12)
    client = inside.send(range(10), 50)
    inside.run()
    assert client.output == answer(range(10), 2, 8)


def test_the_same_state_gives_the_same_plan() -> None:
    inside = world(rows=4, full_pages=30, sliding_pages=30, overlap=False)
    for start in range(6):
        inside.send(range(start % 2, 20 + start), 6)
        inside.deliver()
    inside.scheduler.state.flights.clear()
    first, second = copy.deepcopy(inside.scheduler.state), copy.deepcopy(inside.scheduler.state)
    assert plan_step(first, 0) == plan_step(second, 10**12) is not None


@pytest.mark.parametrize("module", ["planner", "settle", "life", "queue", "request", "state"])
def test_no_module_that_decides_imports_a_clock_a_socket_or_randomness(module: str) -> None:
    tree = ast.parse((Path(planner.__file__).parent / f"{module}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported, "the module was read"
    assert not {name.split(".")[0] for name in imported} & {
        "time",
        "datetime",
        "random",
        "secrets",
        "zmq",
        "socket",
        "os",
    }


def test_pages_are_named_once_and_a_hit_names_only_what_a_window_still_shows() -> None:
    inside = world(page_size=4, window=8, chunk=64, overlap=False)
    inside.send(range(40), 1)
    inside.run()
    inside.send(range(42), 9)
    full, sliding = last_step(inside).pages
    assert (full.group, full.rows, full.firsts, full.counts) == (0, [0 if full.rows == [0] else 1], [0], [11])
    assert (sliding.firsts, sliding.counts) == ([8], [3]), "two pages of the window before 40, one for what follows"
    assert last_step(inside).starts[0].computed == 40
    named = [first for step in inside.steps[2:] for update in step.pages for first in update.firsts]
    inside.run()
    named = [first for step in inside.steps[2:] for update in step.pages for first in update.firsts]
    assert named == [11, 11, 12, 12], "a page each time one is full, per group"


def test_a_row_that_is_given_up_is_named_as_freed_unless_it_starts_again_in_the_same_step() -> None:
    inside = world(rows=1, overlap=False)
    inside.send([1], 1)
    inside.send([2], 1)
    inside.run()
    assert [(len(step.starts), step.freed_rows) for step in inside.steps] == [(1, []), (1, [])]
    inside = world(rows=2, overlap=False)
    inside.send([1], 1)
    inside.send([2], 1)
    inside.deliver()
    assert [(step.starts[0].row, step.freed_rows) for step in inside.steps] == [(0, []), (1, [0])]


def test_a_waiting_request_starts_only_when_what_runs_is_expected_to_leave_it_room() -> None:
    inside = world(page_size=4, full_pages=10, rows=4, overlap=False)
    inside.scheduler.state.share = 1.0
    inside.send(range(8), 20)  # will use 7 pages
    inside.send(range(100, 104), 12)  # will use 4
    inside.send(range(200, 204), 4)  # would fit, but nobody overtakes
    assert (len(inside.scheduler.state.running), len(inside.scheduler.state.queue)) == (1, 2)
    inside.run()
    assert inside.scheduler.state.totals.retracted_requests == 0


def test_what_ends_early_teaches_the_scheduler_to_expect_less() -> None:
    inside = world(full_pages=200)
    for start in range(64):
        inside.send([start], 100, stop_ids=range(48))
        inside.run()
    assert inside.scheduler.state.share < 0.15


def test_the_youngest_gives_its_pages_when_an_older_request_needs_them() -> None:
    inside = world(page_size=1, window=4, full_pages=20, rows=4, overlap=False)
    inside.scheduler.state.share = 0.0
    older = inside.send(range(4), 15)
    inside.scheduler.state.share = 0.0
    younger = inside.send(range(100, 104), 15)
    inside.run()
    assert (older.retractions, younger.retractions) == (0, 1)
    assert older.output == answer(older.prompt, 15, 4)
    assert younger.output == answer(younger.prompt, 15, 4)
    totals = inside.scheduler.state.totals
    assert (totals.retracted_requests, totals.retracted_input_tokens) == (1, 4)
    assert 0 < totals.retracted_output_tokens < 15


def test_a_youngest_request_that_finds_no_page_waits_with_the_ones_it_has() -> None:
    inside = world(page_size=4, window=4, full_pages=4, sliding_pages=50, rows=4, overlap=False)
    inside.scheduler.state.share = 0.0
    older = inside.send(range(4), 5)
    inside.scheduler.state.share = 0.0
    younger = inside.send(range(100, 107), 5)
    inside.run()
    assert (older.retractions, younger.retractions) == (0, 0)
    assert younger.output == answer(younger.prompt, 5, 4)
    assert [0] in [step.rows for step in inside.steps[2:]], "the younger one sat steps out"


def test_a_chunk_leaves_a_page_to_every_older_row() -> None:
    inside = world(page_size=4, window=4, full_pages=12, sliding_pages=12, chunk=64, rows=4, overlap=False)
    inside.scheduler.state.share = 0.0
    inside.send(range(8), 20)
    inside.deliver()
    inside.scheduler.state.share = 0.0
    inside.send(range(100, 136), 1)
    chunk = counts(inside).get(1, 0)
    assert held(inside)[0] <= 11
    assert chunk < 36


def test_copies_of_pages_cannot_stop_the_last_request() -> None:
    """Two rows compute the same ten tokens at once. The tree keeps the pages of one, the other keeps its copies, and
    with them it needs more than there is."""
    inside = world(page_size=1, window=4, full_pages=44, sliding_pages=100, chunk=64, rows=2, overlap=False)
    inside.scheduler.state.share = 0.0
    _, copier = inside.send_all([range(10), [*range(10), *range(20, 40)]], 8)
    assert len(inside.scheduler.state.running) == 2
    inside.run()
    assert copier.retractions == 1
    assert copier.output == answer(copier.prompt, 8, 4)


def test_step_plans_carry_no_sampled_token() -> None:
    inside = world()
    client = inside.send([1, 2, 3], 12)
    inside.run()
    starts: list[StepPlan] = [step for step in inside.steps if step.starts]
    assert len(client.output) == 12
    assert len(starts) == 1
    assert len(starts[0].starts[0].token_ids) == 12
