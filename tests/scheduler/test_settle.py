"""What results change, above all for rows that have nothing to say any more."""

from __future__ import annotations

import pytest

from srt.errors import ProcessLost
from srt.messages import Finish, SpeculationCounts, StepResult
from srt.scheduler.request import Phase
from tests.cache.support import packed
from tests.scheduler.support import held, phase_of, request_of, world
from tests.sim.fake_worker import answer


def test_a_stop_id_ends_a_request_with_the_id_it_matched() -> None:
    inside = world()
    whole = answer([1, 2, 3], 20, 8)
    stop = whole[4]
    client = inside.send([1, 2, 3], 20, stop_ids=[stop, 1000])
    inside.run()
    cut = whole.index(stop) + 1
    assert client.output == whole[:cut]
    assert client.ending == Finish("stop", stop)


def test_tokens_sampled_ahead_of_a_stop_are_dropped() -> None:
    inside = world(overlap=True)
    whole = answer([1, 2, 3], 3, 8)
    client = inside.send([1, 2, 3], 20, stop_ids=[whole[0]])
    assert [step.rows for step in inside.steps] == [[0], [0]]
    inside.run()
    assert client.output == whole[:1]
    assert inside.scheduler.state.totals.generated_tokens == 1


def test_an_aborted_row_keeps_its_pages_until_the_step_in_flight_settles() -> None:
    inside = world(page_size=4, chunk=32, overlap=True)
    client = inside.send(range(20), 20)
    assert len(inside.results) == 2
    request = request_of(inside, client)
    seen = []
    inside.abort(client)
    assert client.ending == Finish("abort"), "the client hears of it at once"
    seen.append((request.phase, held(inside)[0]))
    inside.deliver()
    seen.append((request.phase, held(inside)[0]))
    inside.deliver()
    seen.append((request.phase, held(inside)[0]))
    assert seen == [(Phase.DRAINING, 6), (Phase.DRAINING, 6), (Phase.FINISHED, 0)]


def test_a_row_that_no_step_in_flight_names_is_released_at_once() -> None:
    inside = world(rows=2, chunk=4, step_tokens=4, overlap=False)
    first = inside.send(range(40), 1)
    waiting = inside.send(range(100, 110), 1)
    inside.deliver()
    assert phase_of(inside, waiting) is Phase.QUEUED
    inside.abort(waiting)
    assert waiting.ending == Finish("abort")
    inside.abort(first)
    assert held(inside)[0] > 0
    inside.deliver()
    assert held(inside) == [0, 0]
    assert not inside.scheduler.state.live


def test_pages_enter_the_tree_when_the_step_that_filled_them_has_settled() -> None:
    inside = world(page_size=4, chunk=8, overlap=True)
    prompt = list(range(16))
    inside.send(prompt, 1)
    cache = inside.scheduler.state.cache
    found = [cache.match("", packed([*prompt, 0])).tokens]
    while inside.deliver():
        found.append(cache.match("", packed([*prompt, 0])).tokens)
    assert found == [0, 8, 16]


def test_pages_behind_the_window_are_kept_for_the_steps_in_flight() -> None:
    inside = world(page_size=1, window=4, overlap=True, radix=False)
    client = inside.send(range(10), 20)
    for _ in range(8):
        inside.deliver()
        row = request_of(inside, client).row
        assert row is not None
        assert row.computed == row.settled + 2
        assert row.lease.starts[1] == row.settled - 3


def test_the_last_token_of_an_answer_never_enters_the_tree() -> None:
    inside = world(page_size=1, overlap=True)
    whole = answer([1, 2, 3], 8, 8)
    inside.send([1, 2, 3], 20, stop_ids=[whole[4]])
    inside.run()
    cut = whole.index(whole[4]) + 1
    said = [1, 2, 3, *whole[:cut]]
    assert inside.scheduler.state.cache.match("", packed([*said, 0])).tokens == len(said) - 1


def test_several_accepted_tokens_of_one_row_end_at_the_first_stop() -> None:
    """A drafter's step brings more than one token; the ones after the end do not exist."""
    inside = world(overlap=False, drafts=3)
    client = inside.send([1, 2, 3], 20, stop_ids=[7])
    inside.results.clear()
    inside.turn(StepResult(1, [5], [1], 1))
    inside.results.clear()
    inside.turn(StepResult(2, [6, 7, 8, 9], [4], 1, drafted=[3]))
    assert client.output == [5, 6, 7]
    assert client.ending == Finish("stop", 7)


def test_steps_that_had_no_guess_to_check_are_counted_apart() -> None:
    inside = world(page_size=32, overlap=False, drafts=3)
    client = inside.send([1, 2, 3], 20)
    steps = [([5], []), ([6, 7, 8], [3]), ([9], []), ([9], [2])]  # the prompt's, one of each kind, and one all wrong
    for number, (tokens, drafted) in enumerate(steps, start=1):
        inside.results.clear()
        inside.turn(StepResult(number, tokens, [len(tokens)], 1, drafted=drafted))
    told = SpeculationCounts(steps=2, drafted=5, accepted=2, histogram=(1, 0, 1), plain=2)
    assert request_of(inside, client).speculation.counts() == told
    assert inside.scheduler.state.totals.speculation.counts() == told
    assert told.all_steps + told.accepted == len(client.output)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (StepResult(2, [5], [1], 1), "the worker answered step 2, awaited was step 1"),
        (StepResult(1, [5, 5], [1, 1], 1), "answered step 1 for 2 rows with 2 tokens, sampled were 1 rows"),
        (StepResult(1, [5, 5], [1], 1), "answered step 1 for 1 rows with 2 tokens"),
        (StepResult(1, [5, 5], [2], 1), "sampled 2 tokens for a row of step 1 and checked 0 guesses"),
        (StepResult(1, [5, 5], [2], 1, drafted=[1]), "checked 1 guesses; it was to check at most 0"),
    ],
)
def test_an_answer_to_something_else_means_that_the_worker_is_lost(result: StepResult, sentence: str) -> None:
    inside = world(overlap=False)
    inside.send([1, 2, 3], 5)
    with pytest.raises(ProcessLost, match=sentence):
        inside.turn(result)


def test_an_answer_that_nobody_awaits_means_that_the_worker_is_lost() -> None:
    with pytest.raises(ProcessLost, match="answered step 1, awaited was none"):
        world().turn(StepResult(1, [], [], 1))
