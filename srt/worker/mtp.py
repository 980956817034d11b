"""Guesses of draft modules that are run over a window of positions at a row's frontier.

Module i at position p reads token p + 1 + i. Of the last positions these are guesses, and wrong ones spoil the keys
and values that the module has written there. So each pass begins at the first position that any module has seen with a
wrong token, with the hidden state that the main model had there, and ends at the last computed one:

    main model     ───────computed before───────┬─step──┐
    known tokens   ─────────────────────────────┴───────┴─▶ anchor, guesses
    exact          ─────────────────────┐
    window                              └── k to k + 1 ──┘     for k modules in decode; a chunk more in prefill

With k modules and a of the last guesses right, max(k, a + 1) positions are run, and then every position whose
following k tokens are known has the draft KV of a pass over the finished sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from srt.layers.batch import KVLayer
from srt.layers.ops import Ops
from srt.messages import RowStart
from srt.models.contract import DraftModel
from srt.worker.rows import Ints, Outcome, Rows


class WindowProposer:
    """k guesses a row from k modules, every module over the same window.

    Per row: `_frontier` positions were computed when it last guessed, of which the first `_exact` have their final
    draft KV even if no guess was right, one more for each that was; `_begin` is the first position with a stored
    hidden state. Those of the last positions lie in `_stash` at their position modulo its width.
    """

    def __init__(self, model: DraftModel, kv: Sequence[KVLayer], rows: Rows, ops: Ops, row_count: int) -> None:
        self._model, self._kv, self._rows, self._ops = model, kv, rows, ops
        self._frontier, self._exact, self._begin = (np.zeros(row_count, np.int64) for _ in range(3))
        self._width = max(1, model.modules)
        self._stash = torch.empty(0)

    def start(self, starts: Sequence[RowStart]) -> None:
        """Begin rows behind their hits, whose draft KV is taken as it is."""
        for start in starts:
            row = start.row
            self._frontier[row] = self._exact[row] = self._begin[row] = start.computed

    def skip(self, outcome: Outcome) -> None:
        """Leave a hole in the draft KV: guesses after it are worse until the window has moved on."""
        rows = outcome.step.rows
        self._frontier[rows] = self._exact[rows] = self._begin[rows] = outcome.computed

    def propose(self, outcome: Outcome, hidden: Tensor) -> None:
        """Run all modules over the windows; rows that sampled get guesses."""
        step, rows = outcome.step, outcome.step.rows
        starts = np.minimum(self._frontier[rows], self._exact[rows] + outcome.accepted)
        starts = np.maximum(starts, self._begin[rows])
        counts = outcome.computed - starts
        batch = self._rows.batch(rows, starts, outcome.computed)
        feed = self._hidden_states(outcome, starts, batch.positions.numpy(), hidden)
        ends = batch.query_starts.numpy()[1:].astype(np.int64)
        last = torch.from_numpy(ends[step.emits] - 1)
        self._model.begin(batch)
        for module in range(self._model.modules):
            ids = self._rows.following(rows, counts, batch, 1 + module)
            feed = self._model.forward(module, ids, feed, self._kv[module], batch)
            if len(last):
                logits = self._model.logits(module, feed[last])
                self._rows.guess(step.emitting, module, self._ops.sample_greedy(logits).numpy())
        self._frontier[rows] = outcome.computed
        self._exact[rows] = np.minimum(outcome.computed, outcome.known - self._model.modules)

    def _hidden_states(self, outcome: Outcome, starts: Ints, positions: Ints, hidden: Tensor) -> Tensor:
        """Those of the main model at the windows' positions; keeps what the next windows may begin with."""
        step = outcome.step
        if not len(self._stash):
            self._stash = hidden.new_zeros(len(self._frontier), self._width, hidden.shape[1])
        counts = outcome.computed - starts
        at = np.repeat(np.arange(len(step.rows)), counts)
        fresh = positions >= step.starts[at]
        first_tokens = step.batch.query_starts.numpy()[:-1].astype(np.int64)
        token_rows, slots = step.rows[at], positions % self._width
        if fresh.all():
            feed = hidden[torch.from_numpy(first_tokens[at] + positions - step.starts[at])]
        else:
            feed = hidden.new_empty(len(positions), hidden.shape[1])
            new, old = np.flatnonzero(fresh), np.flatnonzero(~fresh)
            sources = first_tokens[at[new]] + positions[new] - step.starts[at[new]]
            feed[torch.from_numpy(new)] = hidden[torch.from_numpy(sources)]
            kept = self._stash[torch.from_numpy(token_rows[old]), torch.from_numpy(slots[old])]
            feed[torch.from_numpy(old)] = kept
        tail = np.flatnonzero(positions >= outcome.computed[at] - self._width)
        self._stash[torch.from_numpy(token_rows[tail]), torch.from_numpy(slots[tail])] = feed[torch.from_numpy(tail)]
        return feed
