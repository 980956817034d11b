"""The state of requests on the device: one line each, written and read there, so that no step waits for another.

The host knows what plans say. How many tokens a row has is the device's knowledge alone as soon as guesses are
checked, so everything that depends on it is computed there: positions, slots, which guesses were right. A plan that
contradicts the rows is noticed there too, and told with the step's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.batch import ForwardBatch
from srt.messages import PageUpdate, RowStart, StepPlan
from srt.worker.device.layout import Ints, Layout, offsets_within, upload

CONTRADICTED: Final = 1
"""Bit of a step's fault word: a row cannot compute what the plan asks of it."""
NOT_FINITE: Final = 2
"""Bit of a step's fault word: logits are not finite."""


@dataclass(frozen=True)
class DeviceStep:
    """A layout over what the rows held when the step began. Row r computes the positions `[starts, ends)`."""

    layout: Layout
    starts: Tensor
    """[R]."""
    known: Tensor
    """[E] known tokens of the rows that sample, before the step."""
    drafted: Tensor
    """[E] guesses that are there to be checked."""
    fault: Tensor
    """[] int64, 0 if the plan fits the rows."""
    batch: ForwardBatch

    @property
    def emitting(self) -> Tensor:
        """[E] row numbers of those that sample."""
        return self.layout.rows[self.layout.emits]


@dataclass(frozen=True)
class DeviceOutcome:
    """What a step came to: all on the device. `computed` [R] and `known` [R] are those of the rows after it.

    `accepted` [R]: guesses that were right. `report` [L + 2 E + 1]: what was sampled for each wanted logits, how many
    tokens of each row that sampled count, how many of its guesses were checked, and the fault word.
    """

    step: DeviceStep
    computed: Tensor
    known: Tensor
    accepted: Tensor
    report: Tensor


class DeviceRows:
    """All rows, and one more that belongs to nobody: batches are filled up with it, its page is the null page."""

    def __init__(
        self, device: torch.device, groups: int, page_size: int, context_length: int, rows: int, drafts: int = 0
    ) -> None:
        pages = -(-context_length // page_size)
        self.device, self.page_size = device, page_size
        self.nobody, self.drafts = rows, drafts
        self.context_length = context_length
        self.state = torch.zeros(rows + 1, 3, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows + 1, context_length + 1 + drafts, dtype=torch.int32, device=device)
        self.tables = torch.zeros(groups, rows + 1, pages, dtype=torch.int32, device=device)
        self.state[rows, 1] = 1

    @property
    def bytes(self) -> int:
        """What they hold."""
        return self.state.nbytes + self.tokens.nbytes + self.tables.nbytes

    @property
    def computed(self) -> Tensor:
        """[rows + 1]: tokens that have KV."""
        return self.state[:, 0]

    @property
    def known(self) -> Tensor:
        """[rows + 1]: tokens that are there; guesses lie behind them."""
        return self.state[:, 1]

    @property
    def guessed(self) -> Tensor:
        """[rows + 1]: guesses."""
        return self.state[:, 2]

    # --- what plans write ---------------------------------------------------------------------------------

    def apply(self, plan: StepPlan) -> None:
        """Take over the rows and pages that a plan brings.

        Raises: ProcessLost if the plan contradicts what is known of its rows.
        """
        if plan.starts:
            self._start(plan.starts)
        if plan.pages:
            self._write_pages(plan.pages)

    def _start(self, starts: Sequence[RowStart]) -> None:
        tokens = [np.frombuffer(start.token_ids, dtype="<i4").astype(np.int64) for start in starts]
        sizes = np.array([len(ids) for ids in tokens])
        for start, size in zip(starts, sizes, strict=True):
            if start.row >= self.nobody:
                raise ProcessLost(f"row {start.row} starts; there are {self.nobody}")
            if not start.computed < size <= self.context_length:
                raise ProcessLost(
                    f"row {start.row} starts with {size} tokens, {start.computed} computed; "
                    f"it can hold {self.context_length}"
                )
        numbers = np.array([start.row for start in starts])
        computed = np.array([start.computed for start in starts])
        rows, counts, token_rows, places, ids = upload(
            [
                numbers,
                np.stack([computed, sizes, np.zeros_like(sizes)], axis=1).ravel(),
                np.repeat(numbers, sizes),
                offsets_within(sizes),
                np.concatenate(tokens),
            ],
            self.device,
        )
        self.state[rows] = counts.view(-1, 3)
        self.tables[:, rows] = 0
        self.tokens[token_rows, places] = ids.int()

    def _write_pages(self, updates: Sequence[PageUpdate]) -> None:
        """Page table entries, those of all groups in one write."""
        columns: list[list[Ints]] = [[], [], [], []]
        for update in updates:
            counts = np.array(update.counts, np.int64)
            if counts.sum() != len(update.pages):
                raise ProcessLost(f"a page update names {len(update.pages)} pages for {counts.sum()} entries")
            columns[0].append(np.full(len(update.pages), update.group))
            columns[1].append(np.repeat(np.array(update.rows, np.int64), counts))
            columns[2].append(np.repeat(np.array(update.firsts, np.int64), counts) + offsets_within(counts))
            columns[3].append(np.array(update.pages, np.int64))
        groups, rows, places, pages = upload([np.concatenate(parts) for parts in columns], self.device)
        self.tables[groups, rows, places] = pages.int()

    # --- what a step reads --------------------------------------------------------------------------------

    def begin(self, layout: Layout) -> DeviceStep:
        """What a layout means now."""
        rows, emits = layout.rows, layout.emits
        counts = self.state[rows]
        starts, known = counts[:, 0].contiguous(), counts[:, 1]
        sure = starts + layout.counts
        wrong = (sure > known).any() | (sure[emits] != known[emits]).any()
        drafted = torch.minimum(layout.drafts, counts[emits, 2])
        batch = replace(self.batch(layout, starts, starts), logit_tokens=layout.wanted)
        return DeviceStep(layout, starts, known[emits], drafted, wrong.long() * CONTRADICTED, batch)

    def batch(self, layout: Layout, starts: Tensor, valid_from: Tensor) -> ForwardBatch:
        """A pass over the tokens of a layout whose rows begin at `starts` [R]; no wanted logits.

        Tokens at positions before `valid_from` [R] are there to fill the batch: they write to the null page.
        """
        rows, at = layout.rows, layout.token_rows
        token_rows = rows[at]
        positions = starts[at] + layout.offsets
        valid = positions >= valid_from[at]
        positions = positions.clamp(0, self.context_length - 1)
        pages = self.tables[:, token_rows, positions // self.page_size].long()
        slots = (pages * self.page_size + positions % self.page_size) * valid
        return ForwardBatch(
            input_ids=self.tokens[token_rows, positions].long(),
            positions=positions,
            query_starts=layout.query_starts,
            query_starts_list=layout.query_starts_list,
            kv_lens=(starts + layout.widths).int(),
            kv_lens_list=None,
            page_tables=self.tables.unbind(),
            slots=slots.unbind(),
            logit_tokens=layout.wanted[:0],
            page_size=self.page_size,
            table_rows=rows,
        )

    def following(self, layout: Layout, batch: ForwardBatch, distance: int) -> Tensor:
        """The tokens `distance` positions behind those of a batch: [T] int64.

        Behind the known tokens of a row lie its guesses; behind these, anything.
        """
        return self.tokens[layout.rows[layout.token_rows], batch.positions + distance].long()

    # --- what a step leaves -------------------------------------------------------------------------------

    def end(self, step: DeviceStep, sampled: Tensor, finite: Tensor) -> DeviceOutcome:
        """A step is done: what its emitting rows sampled are their next tokens, as far as the guesses agreed.

        `sampled` [L] has one token for each wanted logits; `finite` [L] int32 is 0 where one of them is not a number.
        """
        layout, known = step.layout, step.known
        emitting = step.emitting
        right = self._right_guesses(step, emitting, sampled)
        new = sampled[layout.firsts + right]
        self.tokens[emitting, known + right] = new.int()
        accepted = torch.zeros_like(step.starts).index_put_((layout.emits,), right)
        computed = step.starts + layout.counts + accepted
        after = self.state[layout.rows, 1].index_put_((layout.emits,), known + right + 1)
        state = torch.stack([computed, after, torch.zeros_like(after)], dim=1)
        # The row that belongs to nobody stands still, however often it is in the batch.
        mine = (layout.rows != self.nobody)[:, None]
        self.state[layout.rows] = torch.where(mine, state, self.state[layout.rows])
        fault = step.fault + (finite == 0).any().long() * NOT_FINITE
        report = torch.cat([sampled, right + 1, step.drafted, fault[None]])
        return DeviceOutcome(step, computed, after, accepted, report)

    def _right_guesses(self, step: DeviceStep, emitting: Tensor, sampled: Tensor) -> Tensor:
        """How many of each emitting row's guesses, from the first on, are what was sampled in their place: [E]."""
        layout = step.layout
        if not layout.depth:
            return torch.zeros_like(step.known)
        places = torch.arange(layout.depth, device=self.device)
        guesses = self.tokens[emitting[:, None], step.known[:, None] + places]
        found = sampled[(layout.firsts[:, None] + places).clamp(max=len(sampled) - 1)]
        agrees = (guesses == found) & (places < step.drafted[:, None])
        return agrees.long().cumprod(dim=1).sum(dim=1)

    def guess(self, rows: Tensor, offset: int, tokens: Tensor) -> None:
        """Put a guess for each of `rows` behind its known tokens and the `offset` guesses that are there."""
        self.tokens[rows, self.state[rows, 1] + offset] = tokens.int()
        self.guessed.index_fill_(0, rows, offset + 1)
