"""Draft modules over a window of positions at each row's frontier, on the device.

The windows are those of `srt/worker/mtp.py`; where each begins is known on the device alone. So the batch gives each
row as many tokens as its window may have at most, and tokens before its beginning write to the null page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from srt.layers.batch import KVLayer
from srt.layers.ops import Ops
from srt.messages import RowStart
from srt.models.contract import DraftModel
from srt.worker.device.layout import Layout, layout_of, upload
from srt.worker.device.rows import DeviceOutcome, DeviceRows


class DeviceProposer(Protocol):
    """Guesses ahead; nothing that it does waits for the device."""

    @property
    def bytes(self) -> int:
        """What it keeps of rows."""
        ...

    def start(self, starts: Sequence[RowStart]) -> None:
        """Forget what was known of these rows; they begin anew."""
        ...

    def windows(self, layout: Layout) -> Layout | None:
        """Layout of the pass that guesses behind a step with this layout; None if nothing is ever guessed."""
        ...

    def propose(self, outcome: DeviceOutcome, windows: Layout, hidden: Tensor) -> None:
        """Guess for the rows that have just sampled. `hidden` [T, H]: the main model's, before its final norm."""
        ...

    def skip(self, outcome: DeviceOutcome) -> None:
        """The same step, but nobody will look at guesses."""
        ...


class NoDeviceGuesses:
    """No drafter."""

    bytes = 0

    def start(self, starts: Sequence[RowStart]) -> None:
        """Nothing is known of rows."""

    def windows(self, layout: Layout) -> Layout | None:
        """Nothing is ever guessed."""
        return None

    def propose(self, outcome: DeviceOutcome, windows: Layout, hidden: Tensor) -> None:
        """Nothing is guessed."""

    def skip(self, outcome: DeviceOutcome) -> None:
        """Nothing is missed."""


class DeviceWindows:
    """k guesses a row from k modules. Per row, in `_state`: frontier, exact, begin, as in `WindowProposer`."""

    def __init__(
        self, model: DraftModel, kv: Sequence[KVLayer], rows: DeviceRows, ops: Ops, hidden_size: int, dtype: torch.dtype
    ) -> None:
        self._model, self._kv, self._rows, self._ops = model, kv, rows, ops
        lines, device = rows.nobody + 1, rows.device
        self._state = torch.zeros(lines, 3, dtype=torch.int64, device=device)
        self._stash = torch.zeros(lines, model.modules, hidden_size, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """What it keeps of rows."""
        return self._state.nbytes + self._stash.nbytes

    def start(self, starts: Sequence[RowStart]) -> None:
        """Begin rows behind their hits, whose draft KV is taken as it is."""
        if starts:
            numbers, computed = [start.row for start in starts], [start.computed for start in starts]
            rows, begin = upload([np.array(numbers), np.array(computed)], self._rows.device)
            self._state[rows] = begin[:, None].expand(-1, 3)

    def skip(self, outcome: DeviceOutcome) -> None:
        """Leave a hole in the draft KV: guesses after it are worse until the window has moved on."""
        self._state[outcome.step.layout.rows] = outcome.computed[:, None].expand(-1, 3)

    def windows(self, layout: Layout) -> Layout | None:
        """As many tokens a row as a window may have: those of the step, or those whose guesses came after."""
        widths, emits = layout.host_widths, layout.host_emits
        drafts = np.zeros_like(widths)
        drafts[emits] = layout.host_drafts
        wide = widths - drafts + np.maximum(drafts, self._model.modules - 1)
        asked = np.isin(np.arange(len(widths)), emits)
        found = layout_of(np.zeros_like(wide), wide, asked, np.zeros_like(emits), self._rows.device)
        return replace(found, rows=layout.rows)

    def propose(self, outcome: DeviceOutcome, windows: Layout, hidden: Tensor) -> None:
        """Run all modules over the windows; rows that sampled get guesses."""
        rows, computed = windows.rows, outcome.computed
        state = self._state[rows]
        begins = torch.minimum(state[:, 0], state[:, 1] + outcome.accepted).maximum(state[:, 2])
        batch = self._rows.batch(windows, computed - windows.widths, begins)
        feed = self._hidden_states(outcome, windows, begins, hidden)
        last, emitting = windows.wanted, rows[windows.emits]
        self._model.begin(batch)
        for module in range(self._model.modules):
            ids = self._rows.following(windows, batch, 1 + module)
            feed = self._model.forward(module, ids, feed, self._kv[module], batch)
            if len(last):
                logits = self._model.logits(module, feed[last])
                self._rows.guess(emitting, module, self._ops.sample_greedy(logits))
        exact = torch.minimum(computed, outcome.known - self._model.modules)
        self._state[rows] = torch.stack([computed, exact, state[:, 2]], dim=1)

    def _hidden_states(self, outcome: DeviceOutcome, windows: Layout, begins: Tensor, hidden: Tensor) -> Tensor:
        """Those of the main model at the windows' positions; keeps what the next windows may begin with."""
        step, at, width = outcome.step, windows.token_rows, self._stash.shape[1]
        positions = (outcome.computed - windows.widths)[at] + windows.offsets
        token_rows, slots = windows.rows[at], positions % width
        fresh = positions - step.starts[at]
        sources = step.layout.query_starts[:-1].long()[at] + fresh.clamp(min=0)
        kept = self._stash[token_rows, slots]
        feed = torch.where((fresh >= 0)[:, None], hidden[sources], kept)
        tail = (positions >= begins[at]) & (positions >= outcome.computed[at] - width)
        # What need not be kept is written to the line of nobody.
        self._stash[torch.where(tail, token_rows, self._rows.nobody), slots] = feed
        return feed
