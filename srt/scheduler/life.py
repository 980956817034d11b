"""How requests begin and end. Every ending of a RUNNING request goes through DRAINING; only `leave` frees pages."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final, NamedTuple

from srt.cache.radix import window_pages
from srt.errors import ErrorCode, ServingError
from srt.messages import CANCEL_TO_FREE_BOUNDS_S, Admit, Emission, Failed, Finish, Logprobs, Timing
from srt.scheduler.request import Phase, Request, Row
from srt.scheduler.state import SchedulerState

SHARE_STEP: Final = 1 / 32
"""Weight of one ended request in what is expected of the next."""

SHARE_AFTER_RETRACTION: Final = 1.1
"""Factor on that expectation whenever it was too low."""


def arrive(state: SchedulerState, admit: Admit, now_ns: int) -> Request:
    """A request enters the queue.

    Raises: ServingError if its id lives, the queue is full, or it could not even run alone.
    """
    if admit.rid in state.live:
        raise ServingError(ErrorCode.DUPLICATE_REQUEST_ID, f"a request with id {admit.rid!r} is being served", "rid")
    limit = state.limits.max_queued_requests
    # Whoever can start with the next step does not wait: a burst into an idle server is not an overload.
    waiting = len(state.queue) - len(state.free_rows)
    if waiting >= limit:
        raise ServingError(ErrorCode.OVERLOADED, f"{waiting} requests wait, the limit is {limit}; try again later")
    request = Request(admit, state.arrivals, state.limits.context_length, now_ns)
    refuse_misfits(state, request)
    state.arrivals += 1
    state.live[request.rid] = request
    state.queue.add(request)
    return request


def refuse_misfits(state: SchedulerState, request: Request) -> None:
    """What could not run alone never will.

    Raises: ServingError with what the request needs and what there is, in tokens.
    """
    prompt, context = request.prompt_tokens, state.limits.context_length
    if not 0 < prompt <= context:
        raise ServingError(ErrorCode.PROMPT_TOO_LONG, f"the prompt has {prompt} tokens, allowed are 1 to {context}")
    size = state.cache.page_size
    whole = -(-request.target // size)
    for group, pool in zip(state.cache.groups, state.cache.pools, strict=True):
        if group.window is None and whole > pool.total:
            raise ServingError(
                ErrorCode.DOES_NOT_FIT,
                f"the request needs {request.limit_tokens} tokens ({prompt} of prompt and up to "
                f"{request.limit_tokens - prompt} new ones), the KV pool holds {pool.total * size}",
                "max_new_tokens",
            )
        if group.window is not None and min(whole, window_pages(group.window, size) + 1) > pool.total:
            needed = (window_pages(group.window, size) + 1) * size
            raise ServingError(
                ErrorCode.DOES_NOT_FIT,
                f"a window of {group.window} tokens needs {needed} tokens of KV, "
                f"the pool of the {group.name} layers holds {pool.total * size}",
            )


class Scores(NamedTuple):
    """Log probabilities that go with an emission: of its tokens, and of the next positions of the prompt."""

    output: Logprobs | None = None
    prompt: Logprobs | None = None


NO_SCORES: Final = Scores()


def close(
    state: SchedulerState, request: Request, finish: Finish, now_ns: int, *tokens: int, scores: Scores = NO_SCORES
) -> Emission:
    """End a live request, whatever it is doing, and say so; its row drains on its own."""
    del state.live[request.rid]
    if finish.kind == "abort":
        request.stamps.cancelled_ns = now_ns
    if request.phase is Phase.QUEUED:
        state.queue.remove(request)
        request.move(Phase.FINISHED)
        release_images(state, request)
    else:
        drain(state, request, Phase.FINISHED)
        if finish.kind != "abort" and request.limit_tokens > request.prompt_tokens:
            used = (request.known - request.prompt_tokens) / (request.limit_tokens - request.prompt_tokens)
            state.share += (used - state.share) * SHARE_STEP
    emission = emit(request, tokens, finish, timing(request, now_ns), scores)
    leave_if_settled(state, request)
    count_if_freed(state, request, now_ns)
    return emission


def fail(state: SchedulerState, request: Request, code: ErrorCode, text: str, now_ns: int) -> None:
    """End a running request with an error; its row drains on its own."""
    del state.live[request.rid]
    drain(state, request, Phase.FINISHED)
    state.failed.append(Failed(request.rid, code, text))
    leave_if_settled(state, request)
    count_if_freed(state, request, now_ns)


def retract(state: SchedulerState, request: Request) -> None:
    """Take a running request's pages away; it waits again, before all younger ones, and keeps its tokens."""
    drain(state, request, Phase.QUEUED)
    request.retractions += 1
    state.share = min(1.0, state.share * SHARE_AFTER_RETRACTION)
    totals = state.totals
    totals.retracted_requests += 1
    totals.retracted_input_tokens += request.prompt_tokens
    totals.retracted_output_tokens += request.known - request.prompt_tokens
    leave_if_settled(state, request)


def drain(state: SchedulerState, request: Request, after: Phase) -> None:
    """The one exit of RUNNING. A request that drains already only changes what comes after."""
    if request.phase is Phase.RUNNING:
        request.move(Phase.DRAINING)
        state.running.remove(request)
    request.after = after


def leave_if_settled(state: SchedulerState, request: Request) -> None:
    """Leave DRAINING if no step in flight names the row: only here a row and its pages are given back."""
    row, after = request.row, request.after
    if request.phase is not Phase.DRAINING or row is None or after is None or row.in_flight:
        return
    state.queue.ended(row.lease)
    state.cache.release(row.lease)
    give_row_back(state, row)
    request.row = request.after = None
    request.move(after)
    if after is Phase.QUEUED:
        state.queue.add(request)
    else:
        release_images(state, request)


def release_images(state: SchedulerState, request: Request) -> None:
    """A request has ended and no step names it: its images may go."""
    if request.admit.images:
        state.released.append(request.rid)


def count_if_freed(state: SchedulerState, request: Request, now_ns: int) -> None:
    """If a cancelled request has just left, with or without a row to give back: how long that took."""
    cancelled_ns = request.stamps.cancelled_ns
    if cancelled_ns is None or request.phase is not Phase.FINISHED:
        return
    seconds = (now_ns - cancelled_ns) / 1e9
    state.totals.cancel_to_free_counts[bisect_left(CANCEL_TO_FREE_BOUNDS_S, seconds)] += 1
    state.totals.cancel_to_free_s += seconds


def give_row_back(state: SchedulerState, row: Row) -> None:
    """The row can be taken again; the worker, if it has ever heard of it, hears that with the next plan."""
    del state.rows[row.index]
    state.free_rows.append(row.index)
    if row.lease.told:
        state.freed_rows.append(row.index)
    state.totals.departures += 1


def emit(
    request: Request,
    tokens: tuple[int, ...],
    finish: Finish | None = None,
    timing: Timing | None = None,
    scores: Scores = NO_SCORES,
) -> Emission:
    """What the tokenizer hears of one request."""
    counts = request.speculation.counts() if request.speculation.steps else None
    return Emission(request.rid, tokens, finish, request.cached_tokens, request.retractions, timing, counts, *scores)


def timing(request: Request, now_ns: int) -> Timing:
    """Stages of a request that ends now. One that never ran waited all its life; without a token, 0 for the first."""
    stamps = request.stamps
    admitted_ns = now_ns if stamps.admitted_ns is None else stamps.admitted_ns
    first_ns = stamps.received_ns if stamps.first_token_ns is None else stamps.first_token_ns
    return Timing(
        tokenized_s=(stamps.arrived_ns - stamps.received_ns) / 1e9,
        queue_s=(admitted_ns - stamps.received_ns) / 1e9,
        first_token_s=(first_ns - stamps.received_ns) / 1e9,
        total_s=(now_ns - stamps.received_ns) / 1e9,
    )
