"""Decides one step: budget + requests + cache -> StepPlan. No clock, no socket, no randomness: same state, same plan.

There are no phases. A row could compute `gap` tokens and is granted min(gap, budget, pages); in this order:

    1  rows whose gap is one token: decodes, and guesses beyond it, oldest first
    2  rows with wider gaps: prefills under way, oldest first, a chunk each
    3  requests from the queue, while rows, budget and pages last

When a row finds no page even after eviction, the youngest running request is retracted for it.
"""

from __future__ import annotations

from srt.cache.lease import Match
from srt.messages import PageUpdate, RowStart, StepPlan
from srt.scheduler.image_keys import plain_ids
from srt.scheduler.life import retract
from srt.scheduler.outlook import Outlook
from srt.scheduler.request import Phase, Request, Row, gap
from srt.scheduler.state import Flight, Grant, SchedulerState


class Draft:
    """A step under construction: what is granted so far, the budget that is left, in tokens, and guesses a row."""

    __slots__ = ("budget", "depth", "grants", "starved")

    def __init__(self, budget: int, depth: int) -> None:
        self.budget = budget
        self.depth = depth
        self.grants: list[Grant] = []
        self.starved = False


def plan_step(state: SchedulerState, now_ns: int) -> StepPlan | None:
    """The next step, booked as in flight; None if there is nothing to do, or no step may be sent ahead.

    `now_ns` only stamps the requests that are admitted.
    """
    if len(state.flights) >= state.limits.steps_in_flight:
        return None
    draft = Draft(state.limits.max_step_tokens, state.depth.depth(len(state.running)))
    wide = []
    for request in state.running[:]:
        row = request.row
        if row is None or request.phase is not Phase.RUNNING:
            continue  # retracted a moment ago, for an older row of this step
        wanted = gap(request, row)
        if wanted == 1:
            grant(state, draft, request, row, 1)
        elif wanted > 1:
            wide.append((request, row))
    for request, row in wide:
        if request.phase is Phase.RUNNING and draft.budget > 0:
            grant(state, draft, request, row, gap(request, row))
    if state.free_rows and len(state.queue) and not (draft.starved and state.rows):
        admit_from_queue(state, draft, now_ns)
    return finish_plan(state, draft) if draft.grants else None


def grant(state: SchedulerState, draft: Draft, request: Request, row: Row, wanted: int) -> None:
    """Give a row as many of the wanted tokens as budget, chunk size and pages allow; maybe none."""
    count = min(wanted, draft.budget, state.limits.chunked_prefill_size)
    if count <= 0:
        return  # the budget is spent
    count = affordable(state, request, row, count)
    if count <= 0:
        draft.starved = True
        return
    emits = row.computed + count == request.known + row.pending < request.limit_tokens
    guesses = affordable_guesses(state, draft, request, row, count) if draft.depth and emits and count == 1 else 0
    state.cache.reserve(row.lease, row.computed + count + guesses)
    row.computed += count + guesses
    row.in_flight += 1
    row.pending += emits + guesses
    draft.budget -= count + guesses
    draft.grants.append(Grant(request, row, count, emits, guesses))


def affordable(state: SchedulerState, request: Request, row: Row, count: int) -> int:
    """How many of `count` tokens have a page, or can get one now.

    A chunk leaves a page to each older row, which will need it soon and would else take it back by force.
    """
    size = state.cache.page_size
    slack = row.lease.pages * size - row.computed
    if count <= slack:
        return count
    if slack == 0 and not find_page(state, request):
        return 0
    older = state.running.index(request) if count > 1 else 0
    return min(count, slack + max(0, state.cache.room() - older) * size)


def affordable_guesses(state: SchedulerState, draft: Draft, request: Request, row: Row, count: int) -> int:
    """How many guesses a row may check beyond `count` tokens: up to its target, and only on pages that nobody misses.

    If all are right, the row has computed all but the last token that it may have, and no more.
    """
    if not request.admit.speculative:
        return 0
    end = row.computed + count
    guesses = min(draft.depth, draft.budget - count, request.target - end)
    slack = row.lease.pages * state.cache.page_size - end
    if guesses > slack:
        taken = 1 if slack < 0 else 0
        spare = state.cache.room() - taken - state.running.index(request)
        guesses = min(guesses, slack + (taken + max(0, spare)) * state.cache.page_size)
    return max(0, guesses)


def find_page(state: SchedulerState, request: Request) -> bool:
    """Whether there is a page for a running row; if not, the youngest request is retracted for it.

    The youngest itself waits until an older one ends or needs its pages. If it is alone and still finds none, then
    copies of pages that others had committed are in its way: it is retracted, and finds those pages when it returns.
    """
    while state.cache.room() == 0 and not state.draining:
        victim = state.running[-1]
        if victim is not request:
            retract(state, victim)
        else:
            if len(state.running) == 1 and not state.flights:
                retract(state, request)
            return False
    return state.cache.room() > 0


def admit_from_queue(state: SchedulerState, draft: Draft, now_ns: int) -> None:
    """Start waiting requests in the order of the policy, until one does not fit."""
    seen = (state.totals.departures, state.queue.changes)
    if state.blocked == seen or draft.budget <= 0:
        return
    state.blocked = None
    outlook = Outlook(state)
    for request in state.queue.candidates(lambda request: cached_tokens(state, request)):
        if draft.budget <= 0 or not state.free_rows:
            return
        tokens = request.reusable
        match = state.cache.match(request.admit.namespace, tokens)
        if step_aside(state, request, match, tokens):
            continue
        if not outlook.fits(request, match):
            state.blocked = (state.totals.departures, state.queue.changes)
            return
        row = start(state, request, match, bytes(request.tokens), now_ns)
        grant(state, draft, request, row, gap(request, row))
        outlook.add(request)
        if draft.starved:
            return


def cached_tokens(state: SchedulerState, request: Request) -> int:
    """How many tokens of a waiting request have KV already."""
    return state.cache.match(request.admit.namespace, request.reusable).tokens


def step_aside(state: SchedulerState, request: Request, match: Match, tokens: bytes) -> bool:
    """Whether a request had better wait because a running row computes at least half of what it misses."""
    promise = state.cache.promised(match, tokens)
    if promise is None:
        return False
    lease, pages = promise
    shared = pages * state.cache.page_size - match.tokens
    if 2 * shared < request.known - match.tokens:
        return False
    state.queue.park(request, lease, pages)
    return True


def start(state: SchedulerState, request: Request, match: Match, tokens: bytes, now_ns: int) -> Row:
    """Give a request a row and the pages of its hit. The worker hears of it with its first tokens."""
    state.queue.admit(request)
    request.move(Phase.RUNNING)
    index = state.free_rows.popleft()
    row = Row(index, state.cache.open(match, tokens, request.prompt_tokens), match.tokens)
    state.start(request, row)
    if request.stamps.admitted_ns is None:
        request.stamps.admitted_ns = now_ns
        request.cached_tokens = match.tokens
        state.totals.cache_queries_tokens += request.prompt_tokens
        state.totals.cache_hit_tokens += match.tokens
        state.totals.missed_tokens.update(state.cache.missed(match, request.prompt_tokens))
    return row


def finish_plan(state: SchedulerState, draft: Draft) -> StepPlan:
    """Write the step down as columns, and book it as in flight."""
    state.totals.steps += 1
    step = state.totals.steps
    state.flights.append(Flight(step, draft.grants))
    rows, counts, emits, drafts, starts = [], [], [], [], []
    for request, row, tokens, emitting, guesses in draft.grants:
        rows.append(row.index)
        counts.append(tokens)
        emits.append(emitting)
        drafts.append(guesses)
        if not row.lease.told:
            hit = row.computed - tokens - guesses
            starts.append(row_start(request, row, hit))
    # A row that starts again is wiped anyway, so it is not named as freed: the order of the two cannot matter.
    started = {start.row for start in starts}
    freed = [row for row in state.freed_rows if row not in started]
    state.freed_rows.clear()
    told = drafts if any(drafts) else []
    guess = state.depth.guesses(len(rows)) or (max(counts) > 1 and state.depth.reads_prompts)
    return StepPlan(step, rows, counts, emits, starts, page_updates(state, draft), freed, told, guess)


def row_start(request: Request, row: Row, hit: int) -> RowStart:
    """What the worker hears of a request: its true token ids, and the images that the hit does not cover."""
    admit = request.admit
    images = tuple(span for span in admit.images if span.start + span.tokens > hit)
    ids = plain_ids(row.lease.source, admit.token_ids) if admit.images else row.lease.source
    return RowStart(row.index, ids, hit, request.prompt_tokens, admit.sampling, images, request.logprobs_from)


def page_updates(state: SchedulerState, draft: Draft) -> list[PageUpdate]:
    """The page table entries that the rows of this step have got since the worker last heard of them."""
    news = [(row, row.lease.tell()) for _, row, *_ in draft.grants if row.lease.told < row.lease.pages]
    updates = []
    for group in range(len(state.cache.groups)) if news else ():
        rows: list[int] = []
        firsts: list[int] = []
        counts: list[int] = []
        pages: list[int] = []
        for row, per_group in news:
            first, added = per_group[group]
            if added:
                rows.append(row.index)
                firsts.append(first)
                counts.append(len(added))
                pages.extend(added)
        updates.append(PageUpdate(group, rows, firsts, counts, pages))
    return updates
