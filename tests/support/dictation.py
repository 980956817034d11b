"""Guesses that a test dictates, and the memory that draft modules keep of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor

from srt.layers.batch import KVLayer
from srt.worker.mtp import WindowProposer
from srt.worker.runner import Runner
from tests.support.steps import MTP, Steps


class Dictated:
    """Stands where modules choose their guesses for row 0: of each step's, the first so many are right.

    `known` tells how many tokens the row has, `truth` what stands where in it; `rights` are gone through in turn.
    """

    def __init__(self, known: Callable[[], int], truth: Sequence[int], vocab: int, rights: Sequence[int]) -> None:
        self._known, self._truth, self._vocab = known, truth, vocab
        self._rights = cycle(rights)
        self._offset = self._right = 0

    def sample_greedy(self, logits: Tensor) -> Tensor:
        """The next guess, [1]."""
        if self._offset == 0:
            self._right = next(self._rights)
        at = self._known() + self._offset
        token = self._truth[at] if at < len(self._truth) else 0
        wrong = self._offset >= self._right
        self._offset = (self._offset + 1) % MTP.modules
        return torch.tensor([(token + wrong) % self._vocab])


def draft_kv(steps: Steps, kv: Sequence[KVLayer], row: int, positions: int) -> list[Tensor]:
    """Keys and values of the modules' layers at a row's first positions."""
    size = steps.plan.page_size
    slots = [steps.pages[row][2][p // size] * size + p % size for p in range(positions)]
    return [memory.flatten(0, 1)[slots] for layer in kv for memory in (layer.k, layer.v)]


def windows_of(steps: Steps) -> WindowProposer:
    """The draft modules of a worker on the host."""
    assert isinstance(steps.runner.proposer, WindowProposer)
    return steps.runner.proposer


def dictate(steps: Steps, truth: Sequence[int], rights: Sequence[int]) -> None:
    """Of the guesses of row 0 on the host the first so many are right, step by step in turn."""
    runner = steps.runner
    assert isinstance(runner, Runner)
    told = Dictated(lambda: len(runner.rows.history(0)), truth, steps.plan.model.vocab_size, rights)
    windows_of(steps)._ops = told  # type: ignore[assignment]


def window_kv(steps: Steps, row: int, positions: int) -> list[Tensor]:
    """`draft_kv` of a worker on the host."""
    return draft_kv(steps, windows_of(steps)._kv, row, positions)
