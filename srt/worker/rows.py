"""The state of requests on a worker: one row each, written by step plans, read by forward passes.

A sampled token goes straight into its row's tokens, so the next step finds its input there and no plan ever names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from srt.errors import ProcessLost
from srt.layers.batch import ForwardBatch
from srt.messages import PageUpdate, RowStart, StepPlan
from srt.worker.sampler import SamplingColumns

Ints = NDArray[np.int64]

_COLUMNS = np.dtype(
    [
        ("computed", np.int64),
        ("known", np.int64),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
        ("free_from", np.int64),
    ]
)
"""Host columns. `known` tokens are there, the first `computed` of them have KV; tokens at positions before
`free_from` must not be of the suppressed ids."""


@dataclass(frozen=True)
class Step:
    """A plan's rows as arrays, and the forward pass that they make. `ends` counts a row's tokens after the step."""

    rows: Ints
    ends: Ints
    emitting: Ints
    """The rows that sample, in plan order."""
    batch: ForwardBatch


class Rows:
    """All rows; memory grows with the highest row number in use."""

    def __init__(self, groups: int, page_size: int, context_length: int, rows: int) -> None:
        self._page_size = page_size
        self._width = context_length + 1
        self._pages = -(-context_length // page_size)
        self._host = np.zeros(rows, _COLUMNS)
        self._tokens = np.zeros((rows, self._width), np.int64)
        self._tables = [np.zeros((rows, self._pages), np.int32) for _ in range(groups)]
        self._suppressed: dict[int, tuple[int, ...]] = {}

    # --- what plans write ---------------------------------------------------------------------------------

    def apply(self, plan: StepPlan) -> None:
        """Take over the rows and pages that a plan brings.

        Raises: ProcessLost if the plan contradicts what is known of its rows.
        """
        for row in plan.freed_rows:
            self._suppressed.pop(row, None)
        for start in plan.starts:
            self._start(start)
        for update in plan.pages:
            self._write_pages(update)

    def _start(self, start: RowStart) -> None:
        row, tokens = start.row, np.frombuffer(start.token_ids, dtype="<i4")
        if row >= len(self._host):
            self._grow(row + 1)
        if not start.computed < len(tokens) < self._width:
            raise ProcessLost(
                f"row {row} starts with {len(tokens)} tokens, {start.computed} computed; it can hold {self._width - 1}"
            )
        self._tokens[row, : len(tokens)] = tokens
        for table in self._tables:
            table[row] = 0
        sampling = start.sampling
        self._host[row] = (
            start.computed,
            len(tokens),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.seed & 0xFFFF_FFFF_FFFF_FFFF,
            start.prompt_tokens + sampling.min_new_tokens,
        )
        self._suppressed.pop(row, None)
        if sampling.min_new_tokens and sampling.suppressed_ids:
            self._suppressed[row] = sampling.suppressed_ids

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
        ends = computed + counts
        wrong = (counts < 1) | (ends > known) | (emits & (ends != known))
        if wrong.any():
            at = int(wrong.argmax())
            raise ProcessLost(
                f"step {plan.step}: row {rows[at]} has {known[at]} tokens, {computed[at]} computed;"
                f" it cannot compute {counts[at]} more and {'emit' if emits[at] else 'go on'}"
            )
        if len(set(plan.rows)) < len(rows):
            raise ProcessLost(f"step {plan.step} names a row twice: {sorted(plan.rows)}")
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        if starts[-1] == len(rows):
            token_rows, positions = rows, computed
        else:
            token_rows, positions = np.repeat(rows, counts), np.repeat(computed, counts) + _offsets(counts)
        pages = -(-int(ends.max()) // self._page_size)
        logical = positions // self._page_size
        offsets = positions - logical * self._page_size
        batch = ForwardBatch(
            input_ids=torch.from_numpy(self._tokens[token_rows, positions]),
            positions=torch.from_numpy(positions),
            query_starts=torch.from_numpy(starts),
            query_starts_list=starts.tolist(),
            kv_lens=torch.from_numpy(ends.astype(np.int32)),
            kv_lens_list=ends.tolist(),
            page_tables=tuple(torch.from_numpy(table[:, :pages].take(rows, axis=0)) for table in self._tables),
            slots=tuple(
                torch.from_numpy(table[token_rows, logical] * np.int64(self._page_size) + offsets)
                for table in self._tables
            ),
            logit_tokens=torch.from_numpy(starts[1:][emits].astype(np.int64) - 1),
            page_size=self._page_size,
        )
        return Step(rows, ends, rows[emits], batch)

    def sampling(self, step: Step) -> SamplingColumns:
        """Settings of the rows that emit in a step, in plan order."""
        host = self._host[step.emitting]
        suppressed: list[tuple[int, tuple[int, ...]]] = []
        if self._suppressed:
            for at in np.flatnonzero(host["known"] < host["free_from"]):
                row = int(step.emitting[at])
                if row in self._suppressed:
                    suppressed.append((int(at), self._suppressed[row]))
        return SamplingColumns(
            temperature=host["temperature"],
            top_k=host["top_k"],
            top_p=host["top_p"],
            min_p=host["min_p"],
            seed=host["seed"],
            position=host["known"],
            suppressed=suppressed,
        )

    def end(self, step: Step, sampled: Sequence[int]) -> None:
        """A step is done: its tokens have KV, and what its emitting rows sampled are their next tokens."""
        self._host["computed"][step.rows] = step.ends
        if sampled:
            known = self._host["known"][step.emitting]
            self._tokens[step.emitting, known] = sampled
            self._host["known"][step.emitting] = known + 1


def _offsets(counts: Ints) -> Ints:
    """[0, 1, .., counts[0] - 1, 0, 1, ..]: the place of each item within its run."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    offsets: Ints = np.arange(total) - np.repeat(ends - counts, counts)
    return offsets
