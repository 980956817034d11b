"""Beginnings and endings: refusals with numbers, cancels in every state, one ending each."""

from __future__ import annotations

import pytest

from srt.errors import ErrorCode
from srt.messages import Abort, Admit, Emission, Failed, Finish, SamplingSpec, StopSpec
from srt.scheduler.life import arrive, close
from srt.scheduler.planner import plan_step
from srt.scheduler.request import Phase
from srt.scheduler.settle import settle
from srt.scheduler.state import SchedulerState
from tests.scheduler.support import held, phase_of, request_of, world
from tests.sim.fake_worker import FakeWorker, answer
from tests.sim.world import Client
from tests.support.plans import runtime_plan


def refusal(client: Client) -> Failed:
    """How a request was refused."""
    assert isinstance(client.ending, Failed)
    return client.ending


def test_what_can_never_fit_is_refused_when_it_arrives_with_both_numbers() -> None:
    inside = world(page_size=4, full_pages=10)
    assert inside.send(range(30), 11).ending is None, "its last token needs no KV"
    failed = refusal(inside.send(range(30), 12))
    assert failed.code is ErrorCode.DOES_NOT_FIT
    assert failed.text == "the request needs 42 tokens (30 of prompt and up to 12 new ones), the KV pool holds 40"
    assert failed.param == "max_new_tokens"
    inside.run()


def test_a_window_that_its_pool_cannot_hold_is_refused_but_not_for_sequences_that_do_not_fill_it() -> None:
    inside = world(page_size=4, window=16, sliding_pages=4)
    failed = refusal(inside.send(range(30), 2))
    assert failed.text == "a window of 16 tokens needs 20 tokens of KV, the pool of the sliding layers holds 16"
    client = inside.send(range(10), 4)
    inside.run()
    assert client.output == answer(range(10), 4, 16)


@pytest.mark.parametrize("prompt", [0, 13])
def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(prompt: int) -> None:
    failed = refusal(world(context=12).send(range(prompt), 1))
    assert failed.code is ErrorCode.PROMPT_TOO_LONG
    assert failed.text == f"the prompt has {prompt} tokens, allowed are 1 to 12"


def test_the_queue_limit_counts_those_that_have_to_wait() -> None:
    inside = world(rows=2, queued=3)
    clients = inside.send_all([[number] for number in range(7)], 4)
    refused = [client for client in clients if client.ending is not None]
    assert refused == clients[5:], "two can start, three may wait"
    assert refusal(refused[0]).code is ErrorCode.OVERLOADED
    assert refusal(refused[0]).text == "3 requests wait, the limit is 3; try again later"
    inside.run()
    assert [len(client.output) for client in clients] == [4] * 5 + [0] * 2


def test_an_id_that_lives_is_refused_and_one_that_has_ended_can_be_used_again() -> None:
    inside = world()
    state = inside.scheduler.state
    client = inside.send([1], 1)
    inside.scheduler.turn([Admit(client.rid, bytes(4), SamplingSpec(), StopSpec(1))])
    (failed,) = [message for message in inside.tokenizer.take() if isinstance(message, Failed)]
    assert failed.code is ErrorCode.DUPLICATE_REQUEST_ID
    assert len(state.live) == 1
    inside.abort(client)
    arrive(state, Admit(client.rid, bytes(4), SamplingSpec(), StopSpec(1)), 0)
    assert state.live[client.rid].phase is Phase.QUEUED


def test_a_request_is_cancelled_in_every_state() -> None:
    inside = world(page_size=1, window=4, full_pages=22, rows=2, overlap=True)
    inside.scheduler.state.share = 0.0
    older = inside.send(range(4), 16)
    inside.scheduler.state.share = 0.0
    younger = inside.send(range(100, 104), 16)
    queued = inside.send(range(200, 204), 4)
    assert phase_of(inside, queued) is Phase.QUEUED
    inside.abort(queued)

    while inside.scheduler.state.totals.retracted_requests == 0:
        assert inside.deliver()
    assert phase_of(inside, younger) is Phase.DRAINING, "retracted, with a step in flight"
    inside.abort(younger)
    assert phase_of(inside, older) is Phase.RUNNING
    inside.abort(older)
    assert [client.ending for client in (older, younger, queued)] == [Finish("abort")] * 3
    inside.run()
    assert held(inside) == [0, 0]


def test_a_retracted_request_that_waits_again_can_be_cancelled() -> None:
    inside = world(page_size=1, window=4, full_pages=20, rows=2, overlap=False)
    inside.scheduler.state.share = 0.0
    older = inside.send(range(4), 15)
    inside.scheduler.state.share = 0.0
    younger = inside.send(range(100, 104), 15)
    while inside.scheduler.state.totals.retracted_requests == 0:
        assert inside.deliver()
    assert phase_of(inside, younger) is Phase.QUEUED
    heard = len(younger.output)
    inside.abort(younger)
    inside.run()
    assert (younger.ending, len(younger.output), younger.retractions) == (Finish("abort"), heard, 1)
    assert older.output == answer(range(4), 15, 4)


def test_cancels_of_unknown_and_of_ended_requests_are_ignored() -> None:
    inside = world()
    client = inside.send([1], 1)
    inside.run()
    inside.turn(Abort("nobody"), Abort(client.rid))
    assert client.ending == Finish("length")


def test_a_stop_text_ends_a_request_quietly() -> None:
    inside = world()
    client = inside.send([1, 2], 30)
    inside.deliver()
    inside.stop_matched(client)
    assert client.ending == Finish("stop")
    inside.run()
    assert client.output == answer([1, 2], 1, 8)


def test_the_stages_of_a_request_are_timed_from_its_arrival_at_the_server() -> None:
    plan = runtime_plan(overlap=False)
    state, worker = SchedulerState.from_plan(plan), FakeWorker(4, 8, [64, 64], 8)
    second = 1_000_000_000
    arrive(state, Admit("a", bytes(8), SamplingSpec(), StopSpec(2), received_ns=5 * second), 6 * second)
    closing: list[Emission] = []
    for now in (7 * second, 9 * second):
        step = plan_step(state, now)
        assert step is not None
        closing = settle(state, worker.execute(step), now + second)
    (emission,) = closing
    assert emission.timing is not None
    assert (emission.timing.queue_s, emission.timing.first_token_s, emission.timing.total_s) == (2.0, 3.0, 5.0)


def test_a_request_that_never_ran_has_waited_all_its_life() -> None:
    state = SchedulerState.from_plan(runtime_plan())
    request = arrive(state, Admit("a", bytes(8), SamplingSpec(), StopSpec(2)), 1_000_000_000)
    emission = close(state, request, Finish("abort"), 3_000_000_000)
    assert emission.timing is not None
    assert (emission.timing.queue_s, emission.timing.first_token_s, emission.timing.total_s) == (2.0, 0.0, 2.0)


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    inside = world(page_size=1, window=4, full_pages=20, rows=2, overlap=False)
    inside.scheduler.state.share = 0.0
    inside.send(range(4), 15)
    inside.scheduler.state.share = 0.0
    younger = inside.send(range(100, 104), 15)
    inside.run()
    assert (younger.retractions, younger.cached_tokens) == (1, 0)
    assert inside.scheduler.state.totals.cache_queries_tokens == 8


def test_a_request_draining_after_its_closing_is_no_longer_live() -> None:
    inside = world()
    client = inside.send([1], 9)
    request = request_of(inside, client)
    inside.abort(client)
    assert request.phase is Phase.DRAINING
    assert not inside.scheduler.state.live
