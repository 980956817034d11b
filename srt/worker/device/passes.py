"""What a step is made of on the device: a pass of the main model, sampling, and guessing behind it.

Each part is a function of a layout and of what lies on the device, and enqueues the same kernels for the same layout:
so it may be run now, or recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from srt.layers.batch import KVLayer, PlacedFeatures
from srt.layers.ops import Ops
from srt.models.contract import LanguageModel
from srt.worker.device.layout import Layout, layout_of
from srt.worker.device.mtp import DeviceProposer
from srt.worker.device.rows import DeviceOutcome, DeviceRows, DeviceStep
from srt.worker.device.sampler import RowSampling, Sampler


@dataclass(frozen=True)
class Passed:
    """A pass of the main model: its hidden states [T, H], and the windows of the guesses behind it.

    Not its logits: kept in every record, they would take gigabytes.
    """

    step: DeviceStep
    hidden: Tensor
    windows: Layout | None


class Passes:
    """The main model, its rows and KV memory, what samples, and what guesses."""

    def __init__(
        self,
        model: LanguageModel,
        kv: Sequence[KVLayer],
        rows: DeviceRows,
        ops: Ops,
        proposer: DeviceProposer,
        sampler: Sampler,
    ) -> None:
        self.model, self.rows, self.proposer = model, rows, proposer
        self.sampling = RowSampling(rows.device, rows.nobody)
        self.kv, self._ops, self._sampler = kv, ops, sampler

    def windows(self, layout: Layout) -> Layout | None:
        """Layout of the guesses behind a step with this layout; None if nothing is ever guessed."""
        return self.proposer.windows(layout)

    def compute(
        self,
        layout: Layout,
        windows: Layout | None,
        images: PlacedFeatures | None = None,
        kv_lens: list[int] | None = None,
    ) -> Passed:
        """The main model over a layout's rows; `kv_lens` are theirs where the host knows them."""
        step = self.rows.begin(layout)
        hidden = self.model.forward(replace(step.batch, images=images, kv_lens_list=kv_lens), self.kv)
        return Passed(step, hidden, windows)

    def logits(self, passed: Passed) -> Tensor:
        """The wanted logits: [L, V]."""
        layout = passed.step.layout
        everything = len(layout.wanted) == layout.tokens
        return self.model.logits(passed.hidden if everything else passed.hidden[layout.wanted])

    def take_largest(self, passed: Passed) -> DeviceOutcome:
        """Every row that samples takes the largest logit."""
        step, wanted = passed.step, passed.step.layout.wanted
        if not len(wanted):
            return self.rows.end(step, wanted, wanted)
        return self.rows.end(step, *self._ops.largest(self.logits(passed)))

    def draw(self, passed: Passed, *, filtered: bool) -> DeviceOutcome:
        """Rows that sample draw, or take the largest logit. Unless `filtered`, none of them may have a filter."""
        found = self._sampler.sample(self.logits(passed), passed.step, self.sampling.settings, filtered=filtered)
        return self.rows.end(passed.step, *found)

    def rehearse(self, tokens: int, *, draws: bool = False) -> None:
        """Compute a prompt of so many tokens for nobody, and draw behind it if `draws`: whatever kernels that needs are
        compiled then."""
        nobody, counts = np.array([self.rows.nobody]), np.array([min(tokens, self.rows.context_length)])
        layout = layout_of(nobody, counts, np.array([True]), np.zeros(1, np.int64), self.rows.device)
        passed = self.compute(layout, self.windows(layout), kv_lens=counts.tolist())
        outcome = self.take_largest(passed)
        if draws:
            for filtered in (False, True):
                outcome = self.draw(passed, filtered=filtered)
        if passed.windows is not None:
            self.guess(outcome, passed)
        self.wait()

    def wait(self) -> None:
        """Until the device has done all that was enqueued."""
        if self.rows.device.type == "cuda":
            torch.cuda.synchronize()

    def rehearse_largest(self, chunk: int, drafts: int) -> None:
        """Compute the largest step that may come: a chunk of a prompt, a token of every row with guesses behind it, all
        drawn from."""
        nobody = self.rows.nobody
        counts = np.array([chunk] + [1] * nobody)
        guesses = np.array([0] + [drafts] * nobody)
        layout = layout_of(np.full(nobody + 1, nobody), counts, counts > 0, guesses, self.rows.device)
        passed = self.compute(layout, self.windows(layout))
        outcome = self.draw(passed, filtered=True)
        if passed.windows is not None:
            self.guess(outcome, passed)

    def guess(self, outcome: DeviceOutcome, passed: Passed) -> None:
        """Guess behind a step."""
        assert passed.windows is not None, "without windows nothing is guessed"
        self.proposer.propose(outcome, passed.windows, passed.hidden)
