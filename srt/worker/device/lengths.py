"""How far the host knows rows to be: to the token, until a row's guesses are checked; from then on at least so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from srt.messages import RowStart, StepPlan
from srt.worker.device.layout import Ints


class HostLengths:
    """Computed tokens of rows, by what plans have said."""

    def __init__(self, rows: int) -> None:
        self._computed = np.zeros(rows, np.int64)
        self._sure = np.zeros(rows, np.bool_)

    def start(self, starts: Sequence[RowStart]) -> None:
        """Rows begin anew."""
        for start in starts:
            self._computed[start.row] = start.computed
            self._sure[start.row] = True

    def advance(self, plan: StepPlan) -> tuple[Ints, list[int] | None]:
        """Where each of a plan's rows begins at least, and how many keys each has then; None if a row may have more."""
        rows, counts = np.array(plan.rows, np.int64), np.array(plan.counts, np.int64)
        guesses = np.array(plan.drafts or [0] * len(rows), np.int64) * np.array(plan.emits, np.bool_)
        starts: Ints = self._computed[rows]
        ends = (starts + counts + guesses).tolist() if self._sure[rows].all() else None
        self._computed[rows] += counts
        self._sure[rows] &= guesses == 0
        return starts, ends
