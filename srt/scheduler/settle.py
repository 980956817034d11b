"""What a step's result changes: accepted tokens, endings, committed and released pages."""

from __future__ import annotations

from srt.errors import ErrorCode, ProcessLost
from srt.messages import Emission, Finish, ImageWork, RowEnding, RowLogprobs, StepResult
from srt.scheduler.life import NO_SCORES, Scores, close, count_if_freed, emit, fail, leave_if_settled
from srt.scheduler.request import Phase, Request, Row
from srt.scheduler.state import Grant, SchedulerState


def settle(state: SchedulerState, result: StepResult, now_ns: int) -> list[Emission]:
    """Book the result of the oldest step in flight, and say what the tokenizer has to hear.

    Raises: ProcessLost if the worker answers another step, or for other rows than it was told to.
    """
    if not state.flights or state.flights[0].step != result.step:
        awaited = f"step {state.flights[0].step}" if state.flights else "none"
        raise ProcessLost(f"the worker answered step {result.step}, awaited was {awaited}")
    flight = state.flights.popleft()
    count_images(state, result.images)
    state.totals.recorded_bytes = result.recorded_bytes
    emitting = sum(grant.emits for grant in flight.grants)
    if len(result.token_counts) != emitting or sum(result.token_counts) != len(result.token_ids):
        raise ProcessLost(
            f"the worker answered step {result.step} for {len(result.token_counts)} rows with "
            f"{len(result.token_ids)} tokens, sampled were {emitting} rows"
        )
    if state.depth.drafts and flight.decodes:
        tokens_us = sum(result.token_counts), result.elapsed_us, result.guess_us
        state.depth.observe(len(flight.grants), sum(result.drafted), *tokens_us)
    endings = {ending.at: ending for ending in result.endings}
    emissions: list[Emission] = []
    logprobs = {told.at: told for told in result.logprobs}
    at = emitted = 0
    for place, grant in enumerate(flight.grants):
        tokens: tuple[int, ...] = ()
        drafted = 0
        ending = None
        if grant.emits:
            ending = endings.get(emitted)
            count = result.token_counts[emitted]
            tokens = tuple(result.token_ids[at : at + count])
            at += count
            drafted = result.drafted[emitted] if result.drafted else 0
            emitted += 1
            if not 0 < count <= drafted + 1 or drafted > grant.drafts:
                raise ProcessLost(
                    f"the worker sampled {count} tokens for a row of step {result.step} and checked {drafted} guesses; "
                    f"it was to check at most {grant.drafts}"
                )
        if grant.emits and state.depth.drafts:
            observe(state, grant.request, drafted, len(tokens) - 1)
        emission = settle_row(state, grant, tokens, now_ns, logprobs.get(place), ending)
        if emission is not None:
            emissions.append(emission)
    return emissions


def count_images(state: SchedulerState, work: ImageWork | None) -> None:
    """Add what the image tower did."""
    if work is not None:
        totals = state.totals
        totals.images_encoded += work.images
        totals.image_cache_hits += work.hits
        totals.image_batches += work.batches
        totals.image_encode_us += work.elapsed_us


def observe(state: SchedulerState, request: Request, drafted: int, accepted: int) -> None:
    """Count what a step's guesses came to, before any ending cuts the tokens."""
    if request.phase is Phase.RUNNING:
        request.speculation.observe(drafted, accepted)
        state.totals.speculation.observe(drafted, accepted)


def settle_row(
    state: SchedulerState,
    grant: Grant,
    tokens: tuple[int, ...],
    now_ns: int,
    logprobs: RowLogprobs | None = None,
    ending: RowEnding | None = None,
) -> Emission | None:
    """One row of a step. Tokens of a row that drains are dropped: its request has ended, or will sample them again."""
    request, row = grant.request, grant.row
    right = len(tokens) - grant.emits
    row.settled += grant.tokens + right
    row.computed -= grant.drafts - right
    row.in_flight -= 1
    accepted: tuple[int, ...] = ()
    finish, scores = None, NO_SCORES
    if request.phase is Phase.RUNNING:
        row.pending -= grant.emits + grant.drafts
        accepted, finish = accept(request, row, tokens if ending is None else tokens[: ending.tokens])
        if ending is not None and not ending.fault and (finish is None or finish.kind == "length"):
            finish = Finish("stop")
        state.totals.generated_tokens += len(accepted)
        if logprobs is not None:
            scores = score(request, logprobs, len(accepted))
        if accepted and request.stamps.first_token_ns is None:
            request.stamps.first_token_ns = now_ns
    commit(state, request, row)
    if finish is None and request.phase is Phase.RUNNING and ending is not None:
        fail(state, request, ErrorCode.CONSTRAINT_FAILED, ending.fault, now_ns)
        return None
    if finish is not None:
        return close(state, request, finish, now_ns, *accepted, scores=scores)
    if request.phase is not Phase.RUNNING:
        leave_if_settled(state, request)
        count_if_freed(state, request, now_ns)
    return emit(request, accepted, scores=scores) if accepted or scores.prompt is not None else None


def score(request: Request, logprobs: RowLogprobs, accepted: int) -> Scores:
    """Log probabilities to pass on. Those of the prompt are not wanted again, should the request be retracted."""
    prompt = logprobs.prompt
    if prompt is not None:
        assert request.logprobs_from is not None, f"{request.rid} has all of its prompt's log probabilities"
        scored = request.logprobs_from + len(prompt)
        request.logprobs_from = scored if scored < request.prompt_tokens else None
    return Scores(None if logprobs.output is None else logprobs.output.head(accepted), prompt)


def accept(request: Request, row: Row, sampled: tuple[int, ...]) -> tuple[tuple[int, ...], Finish | None]:
    """Append sampled tokens up to the first that ends the request; returns those, and why it ends if it does."""
    for index, token in enumerate(sampled):
        request.tokens += token.to_bytes(4, "little")
        if token in request.stop_ids:
            return sampled[: index + 1], Finish("stop", token)
        if request.known >= request.limit_tokens:
            return sampled[: index + 1], Finish("length")
    ended = not sampled and request.known >= request.limit_tokens and row.settled >= request.prompt_tokens
    return sampled, Finish("length") if ended else None


def commit(state: SchedulerState, request: Request, row: Row) -> None:
    """Offer to the tree what is computed and final. The last token of an answer is not: that it has KV is chance."""
    answered = request.known > request.prompt_tokens
    state.cache.commit(row.lease, request.tokens, min(row.settled, request.known - answered), row.settled)
    state.queue.committed(row.lease)
