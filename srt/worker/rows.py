"""The state of requests on a worker: one row each, written by step plans, read by forward passes.

A sampled token goes straight into its row's tokens, so the next step finds its input there and no plan ever names it.
So do guesses: they lie behind the known tokens, where the step that checks them reads its input.

**One row of logits, one token.** A row that emits wants `drafts + 1` rows of logits, in order, and so do the arrays of
`Rows.sampling`: entry j of a row samples the token at position `known + j`, as if its first j guesses were right.
Whatever changes logits or depends on earlier tokens is worked out for each entry by itself, from the tokens before its
position: `tokens[row, :known + j]`, the last j of which are guesses (penalties count them, a grammar advances over them
on a copy of its state, `min_new_tokens` counts them). Nothing of that is kept: which entries count is known in
`Rows.end`, which keeps the first of a row and one more for each right guess. What a row must remember from step to step
is updated there, from `Outcome.token_ids`, and what is told of a token (its log probability) is taken from the entries
that were kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from srt.errors import ProcessLost
from srt.layers.batch import ForwardBatch
from srt.messages import PageUpdate, RowStart, StepPlan
from srt.worker.edits import LogitEdits, RowEdits
from srt.worker.sampler import SamplingColumns

Ints = NDArray[np.int64]

_COLUMNS = np.dtype(
    [
        ("computed", np.int64),
        ("known", np.int64),
        ("guessed", np.int64),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
    ]
)
"""Host columns. `known` tokens are there, the first `computed` of them have KV; `guessed` more lie behind them."""


@dataclass(frozen=True)
class Step:
    """A plan's rows as arrays, and the forward pass that they make.

    A row computes the positions `[starts, ends)`; those from `sure` on are guesses. `emitting` are the rows that
    sample, those where `emits`, with `drafts` guesses each; there are `drafts + 1` wanted logits of each one.
    """

    rows: Ints
    starts: Ints
    sure: Ints
    ends: Ints
    emits: NDArray[np.bool_]
    emitting: Ints
    drafts: Ints
    batch: ForwardBatch


@dataclass(frozen=True)
class Outcome:
    """What a step came to. `computed` and `known` are those of `step.rows` after it.

    `accepted`: guesses of each of `step.rows` that were right; `token_ids`: for each of `step.emitting` in turn,
    `token_counts` new tokens.
    """

    step: Step
    computed: Ints
    known: Ints
    accepted: Ints
    token_ids: list[int]
    token_counts: list[int]


class Rows:
    """All rows; memory grows with the highest row number in use."""

    def __init__(self, groups: int, page_size: int, context_length: int, rows: int, drafts: int = 0) -> None:
        self._page_size = page_size
        self._width = context_length + 1 + drafts
        self._context_length = context_length
        self._pages = -(-context_length // page_size)
        self._host = np.zeros(rows, _COLUMNS)
        self._tokens = np.zeros((rows, self._width), np.int64)
        self._tables = [np.zeros((rows, self._pages), np.int32) for _ in range(groups)]
        self._edits: dict[int, RowEdits] = {}

    # --- what plans write ---------------------------------------------------------------------------------

    def apply(self, plan: StepPlan) -> None:
        """Take over the rows and pages that a plan brings.

        Raises: ProcessLost if the plan contradicts what is known of its rows.
        """
        for row in plan.freed_rows:
            self._edits.pop(row, None)
        for start in plan.starts:
            self._start(start)
        for update in plan.pages:
            self._write_pages(update)

    def _start(self, start: RowStart) -> None:
        row, tokens = start.row, np.frombuffer(start.token_ids, dtype="<i4")
        if row >= len(self._host):
            self._grow(row + 1)
        if not start.computed < len(tokens) <= self._context_length:
            raise ProcessLost(
                f"row {row} starts with {len(tokens)} tokens, {start.computed} computed; "
                f"it can hold {self._context_length}"
            )
        self._tokens[row, : len(tokens)] = tokens
        for table in self._tables:
            table[row] = 0
        sampling = start.sampling
        self._host[row] = (
            start.computed,
            len(tokens),
            0,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.seed & 0xFFFF_FFFF_FFFF_FFFF,
        )
        self._edits.pop(row, None)
        if RowEdits.wanted(sampling):
            self._edits[row] = RowEdits(sampling, self._tokens[row, : len(tokens)], start.prompt_tokens)

    def _grow(self, rows: int) -> None:
        more = max(rows, 2 * len(self._host)) - len(self._host)
        self._host = np.concatenate([self._host, np.zeros(more, _COLUMNS)])
        self._tokens = np.pad(self._tokens, ((0, more), (0, 0)))
        self._tables = [np.pad(table, ((0, more), (0, 0))) for table in self._tables]

    def _write_pages(self, update: PageUpdate) -> None:
        """Page table entries, all of an update in one write."""
        counts = np.array(update.counts, np.int64)
        if counts.sum() != len(update.pages):
            raise ProcessLost(f"a page update names {len(update.pages)} pages for {counts.sum()} entries")
        rows = np.repeat(np.array(update.rows, np.int64), counts)
        columns = np.repeat(np.array(update.firsts, np.int64), counts) + _offsets(counts)
        self._tables[update.group][rows, columns] = update.pages

    # --- what a step reads --------------------------------------------------------------------------------

    def begin(self, plan: StepPlan) -> Step:
        """The arrays and tensors of a step.

        Raises: ProcessLost if a row would compute tokens that are not known, emit before its last one, or is named
            twice.
        """
        rows, counts = np.array(plan.rows, np.int64), np.array(plan.counts, np.int64)
        emits = np.array(plan.emits, np.bool_)
        computed, known = self._host["computed"][rows], self._host["known"][rows]
        sure = computed + counts
        wrong = (counts < 1) | (sure > known) | (emits & (sure != known))
        if wrong.any():
            at = int(wrong.argmax())
            raise ProcessLost(
                f"step {plan.step}: row {rows[at]} has {known[at]} tokens, {computed[at]} computed;"
                f" it cannot compute {counts[at]} more and {'emit' if emits[at] else 'go on'}"
            )
        if len(set(plan.rows)) < len(rows):
            raise ProcessLost(f"step {plan.step} names a row twice: {sorted(plan.rows)}")
        emitting, ends = rows[emits], sure
        drafts = np.zeros(len(emitting), np.int64)
        if plan.drafts:
            drafts = np.minimum(np.array(plan.drafts, np.int64)[emits], self._host["guessed"][emitting])
            ends = sure.copy()
            ends[emits] += drafts
        batch = self.batch(rows, computed, ends)
        wanted = batch.query_starts.numpy()[1:][emits].astype(np.int64) - 1
        if drafts.any():
            wanted = np.repeat(wanted - drafts, drafts + 1) + _offsets(drafts + 1)
        return Step(
            rows, computed, sure, ends, emits, emitting, drafts, replace(batch, logit_tokens=torch.from_numpy(wanted))
        )

    def batch(self, rows: Ints, starts: Ints, ends: Ints) -> ForwardBatch:
        """A pass over the positions `[starts, ends)` of rows, without wanted logits."""
        counts = ends - starts
        queries = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=queries[1:])
        if queries[-1] == len(rows):
            token_rows, positions = rows, starts
        else:
            token_rows, positions = np.repeat(rows, counts), np.repeat(starts, counts) + _offsets(counts)
        pages = -(-int(ends.max()) // self._page_size)
        logical = positions // self._page_size
        offsets = positions - logical * self._page_size
        return ForwardBatch(
            input_ids=torch.from_numpy(self._tokens[token_rows, positions]),
            positions=torch.from_numpy(positions),
            query_starts=torch.from_numpy(queries),
            query_starts_list=queries.tolist(),
            kv_lens=torch.from_numpy(ends.astype(np.int32)),
            kv_lens_list=ends.tolist(),
            page_tables=tuple(torch.from_numpy(table[:, :pages].take(rows, axis=0)) for table in self._tables),
            slots=tuple(
                torch.from_numpy(table[token_rows, logical] * np.int64(self._page_size) + offsets)
                for table in self._tables
            ),
            logit_tokens=torch.empty(0, dtype=torch.int64),
            page_size=self._page_size,
        )

    def following(self, rows: Ints, counts: Ints, batch: ForwardBatch, distance: int) -> torch.Tensor:
        """The tokens `distance` positions behind those of a batch with `counts` tokens of each of `rows`: [T] int64.

        Behind the known tokens of a row lie its guesses; behind these, anything.
        """
        return torch.from_numpy(self._tokens[np.repeat(rows, counts), batch.positions.numpy() + distance])

    def history(self, row: int) -> Ints:
        """All known tokens of a row."""
        tokens: Ints = self._tokens[row, : self._host["known"][row]]
        return tokens

    def guesses(self, row: int, count: int) -> Ints:
        """The first guesses of a row."""
        known = int(self._host["known"][row])
        tokens: Ints = self._tokens[row, known : known + count]
        return tokens

    def known(self, rows: Ints) -> Ints:
        """How many tokens these rows have."""
        known: Ints = self._host["known"][rows].copy()
        return known

    def catch_up(self, rows: Ints, state: Ints, tokens: Ints) -> None:
        """Take over what a device knows: `state` [R, 3] is computed, known and guessed tokens of each row, `tokens`
        [R, N] those behind the ones that are known here."""
        places = self.known(rows)[:, None] + np.arange(tokens.shape[1])
        inside = places < state[:, 1:].sum(axis=1)[:, None]
        at = np.broadcast_to(rows[:, None], places.shape)[inside]
        self._tokens[at, places[inside]] = tokens[inside]
        for column, name in enumerate(("computed", "known", "guessed")):
            self._host[name][rows] = state[:, column]

    def sampling(self, step: Step) -> SamplingColumns:
        """Settings of the logits that a step wants, in plan order."""
        emitting, positions = step.emitting, self._host["known"][step.emitting]
        if step.drafts.any():
            widths = step.drafts + 1
            emitting, positions = np.repeat(emitting, widths), np.repeat(positions, widths) + _offsets(widths)
        host = self._host[emitting]
        return SamplingColumns(
            temperature=host["temperature"],
            top_k=host["top_k"],
            top_p=host["top_p"],
            min_p=host["min_p"],
            seed=host["seed"],
            position=positions,
            edits=self._collected(step) if self._edits else None,
        )

    def _collected(self, step: Step) -> LogitEdits | None:
        """What the rows of a step want changed in their logits; None if nothing."""
        edits, first = LogitEdits(), 0
        for row, guesses in zip(step.emitting.tolist(), step.drafts.tolist(), strict=True):
            wants = self._edits.get(row)
            if wants is not None:
                wants.collect(edits, first, self._tokens[row, : self._host["known"][row] + guesses], guesses)
            first += guesses + 1
        return edits or None

    # --- what a step leaves -------------------------------------------------------------------------------

    def end(self, step: Step, sampled: Ints) -> Outcome:
        """A step is done: what its emitting rows sampled are their next tokens, as far as the guesses agreed.

        `sampled` has one token for each wanted logits. The first of a row follows its last sure token. Each further one
        follows a guess, and means something only if all guesses up to there are what was sampled: so each kept token
        is the one that is sampled without a drafter.
        """
        known, right, last = self._host["known"][step.emitting], step.drafts, sampled
        accepted, computed, token_ids = np.zeros(len(step.rows), np.int64), step.sure, sampled
        if step.drafts.any():
            widths = step.drafts + 1
            firsts = np.cumsum(widths) - widths
            right = self._right_guesses(step, sampled, firsts)
            last = sampled[firsts + right]
            accepted[step.emits] = right
            computed = step.sure + accepted
            token_ids = sampled[np.repeat(firsts, right + 1) + _offsets(right + 1)]
        counts = right + 1
        self._tokens[step.emitting, known + right] = last
        self._host["known"][step.emitting] = known + counts
        self._host["computed"][step.rows] = computed
        self._host["guessed"][step.rows] = 0
        after = self._host["known"][step.rows]
        return Outcome(step, computed, after, accepted, token_ids.tolist(), counts.tolist())

    def _right_guesses(self, step: Step, sampled: Ints, firsts: Ints) -> Ints:
        """How many of each emitting row's guesses, from the first on, are what was sampled in their place."""
        drafts = step.drafts
        agrees = np.zeros((len(drafts), int(drafts.max()) + 1), np.bool_)
        at, offset = np.repeat(np.arange(len(drafts)), drafts), _offsets(drafts)
        places = self._host["known"][step.emitting][at] + offset
        agrees[at, offset] = self._tokens[step.emitting[at], places] == sampled[firsts[at] + offset]
        right: Ints = agrees.argmin(axis=1)
        return right

    def guess(self, rows: Ints, offset: int, tokens: Ints) -> None:
        """Put a guess for each of `rows` behind its known tokens and the `offset` guesses that are there."""
        self._tokens[rows, self._host["known"][rows] + offset] = tokens
        self._host["guessed"][rows] = offset + 1


def _offsets(counts: Ints) -> Ints:
    """[0, 1, .., counts[0] - 1, 0, 1, ..]: the place of each item within its run."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    offsets: Ints = np.arange(total) - np.repeat(ends - counts, counts)
    return offsets
