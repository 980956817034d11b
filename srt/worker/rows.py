"""The state of requests on a worker: one row each, written by step plans, read by forward passes.

Tokens and page tables live where the model lives; counters live on the host. A sampled token goes straight into its
row's tokens, so the next step finds its input there and no plan ever names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.batch import ForwardBatch
from srt.messages import PageUpdate, RowStart, StepPlan
from srt.worker.sampler import SamplingColumns

Ints = NDArray[np.int64]

_COLUMNS = np.dtype(
    [
        ("computed", np.int64),
        ("known", np.int64),
        ("prompt", np.int64),
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


class Rows:
    """All rows; memory grows with the highest row number in use."""

    def __init__(self, group_names: Sequence[str], page_size: int, context_length: int, rows: int) -> None:
        self._page_size = page_size
        self._group_names = group_names
        self._width = context_length + 1
        self._pages = -(-context_length // page_size)
        self._host = np.zeros(rows, _COLUMNS)
        self._tokens = torch.zeros(rows, self._width, dtype=torch.int64)
        self._tables = [torch.zeros(rows, self._pages, dtype=torch.int32) for _ in group_names]
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
        self._tokens[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        for table in self._tables:
            table[row].zero_()
        sampling = start.sampling
        self._host[row] = (
            start.computed,
            len(tokens),
            start.prompt_tokens,
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
        self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(more, self._width)])
        self._tables = [torch.cat([table, table.new_zeros(more, self._pages)]) for table in self._tables]

    def _write_pages(self, update: PageUpdate) -> None:
        """Page table entries, all of an update in one write."""
        counts = np.array(update.counts, dtype=np.int64)
        if counts.sum() != len(update.pages):
            raise ProcessLost(f"a page update names {len(update.pages)} pages for {counts.sum()} entries")
        rows = np.repeat(np.array(update.rows, dtype=np.int64), counts)
        columns = np.repeat(np.array(update.firsts, dtype=np.int64), counts) + _offsets(counts)
        pages = torch.tensor(update.pages, dtype=torch.int32)
        self._tables[update.group][torch.from_numpy(rows), torch.from_numpy(columns)] = pages

    # --- what a step reads --------------------------------------------------------------------------------

    def batch(self, plan: StepPlan) -> ForwardBatch:
        """The tensors of a step.

        Raises: ProcessLost if a row would compute tokens that are not known, or emit before its last one.
        """
        rows, counts = np.array(plan.rows, dtype=np.int64), np.array(plan.counts, dtype=np.int64)
        emits = np.array(plan.emits, dtype=bool)
        computed = self._host["computed"][rows]
        ends = computed + counts
        wrong = (counts < 1) | (ends > self._host["known"][rows]) | (emits & (ends != self._host["known"][rows]))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ProcessLost(
                f"step {plan.step}: row {rows[at]} has {self._host['known'][rows[at]]} tokens, {computed[at]} computed;"
                f" it cannot compute {counts[at]} more and {'emit' if emits[at] else 'go on'}"
            )
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        positions = torch.from_numpy(np.repeat(computed, counts) + _offsets(counts))
        token_rows = torch.from_numpy(np.repeat(rows, counts))
        row_index = torch.from_numpy(rows)
        pages = -(-int(ends.max()) // self._page_size)
        logical, offset = positions // self._page_size, positions % self._page_size
        return ForwardBatch(
            input_ids=self._tokens[token_rows, positions],
            positions=positions,
            query_starts=torch.from_numpy(starts),
            query_starts_list=starts.tolist(),
            kv_lens=torch.from_numpy(ends.astype(np.int32)),
            kv_lens_list=ends.tolist(),
            page_tables=tuple(table[:, :pages].index_select(0, row_index) for table in self._tables),
            slots=tuple(table[token_rows, logical] * self._page_size + offset for table in self._tables),
            logit_tokens=torch.from_numpy(starts[1:][emits].astype(np.int64) - 1),
            page_size=self._page_size,
        )

    def sampling(self, plan: StepPlan) -> SamplingColumns:
        """Settings of the rows that emit in a step, in plan order."""
        rows = _emitting(plan)
        host = self._host[rows]
        suppressed: list[tuple[int, tuple[int, ...]]] = []
        if self._suppressed:
            early = np.flatnonzero(host["known"] < host["free_from"])
            suppressed = [(int(at), self._suppressed[int(rows[at])]) for at in early if rows[at] in self._suppressed]
        return SamplingColumns(
            temperature=host["temperature"],
            top_k=host["top_k"],
            top_p=host["top_p"],
            min_p=host["min_p"],
            seed=host["seed"],
            position=host["known"],
            suppressed=suppressed,
        )

    def advance(self, plan: StepPlan, sampled: Tensor | None) -> None:
        """A step is done: its tokens have KV, and what its emitting rows sampled are their next tokens."""
        np.add.at(self._host["computed"], plan.rows, plan.counts)
        if sampled is None:
            return
        rows = _emitting(plan)
        self._tokens[torch.from_numpy(rows), torch.from_numpy(self._host["known"][rows])] = sampled
        self._host["known"][rows] += 1


def _emitting(plan: StepPlan) -> Ints:
    rows: NDArray[Any] = np.array([row for row, emits in zip(plan.rows, plan.emits, strict=True) if emits], np.int64)
    return rows


def _offsets(counts: Ints) -> Ints:
    """[0, 1, .., counts[0] - 1, 0, 1, ..]: the place of each item within its run."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    offsets: Ints = np.arange(total) - np.repeat(ends - counts, counts)
    return offsets
