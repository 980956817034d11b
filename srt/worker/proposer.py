"""Where guesses come from: after each step a proposer writes what may follow behind the known tokens of rows.

A guess never changes an answer, only how many steps it takes: the next step checks it (`Rows.end`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from torch import Tensor

from srt.messages import RowStart
from srt.worker.rows import Ints, Outcome, Rows


class Proposer(Protocol):
    """Guesses ahead. Sees every step, on every rank with the same result."""

    def start(self, starts: Sequence[RowStart]) -> None:
        """Forget what was known of these rows; they begin anew."""
        ...

    def propose(self, outcome: Outcome, hidden: Tensor) -> None:
        """Guess for the rows that have just sampled. `hidden` [T, H]: the main model's, before its final norm."""
        ...

    def skip(self, outcome: Outcome) -> None:
        """The same step, but nobody will look at guesses."""
        ...


class NoGuesses:
    """No drafter."""

    def start(self, starts: Sequence[RowStart]) -> None:
        """Nothing is known of rows."""

    def propose(self, outcome: Outcome, hidden: Tensor) -> None:
        """Nothing is guessed."""

    def skip(self, outcome: Outcome) -> None:
        """Nothing is missed."""


SHORTEST_MATCH: Final = 2
LONGEST_MATCH: Final = 8


class NgramProposer:
    """What came after the last tokens where they stood before: in the same prompt and answer. Costs no model."""

    def __init__(self, rows: Rows, drafts: int) -> None:
        self._rows, self._drafts = rows, drafts

    def start(self, starts: Sequence[RowStart]) -> None:
        """Nothing is kept of rows."""

    def propose(self, outcome: Outcome, hidden: Tensor) -> None:
        """Look up the last tokens of each row that sampled."""
        for row in outcome.step.emitting.tolist():
            found = lookup(self._rows.history(row), self._drafts)
            for offset, token in enumerate(found):
                self._rows.guess(np.array([row]), offset, np.array([token]))

    def skip(self, outcome: Outcome) -> None:
        """Nothing is missed: it looks at all tokens each time."""


def lookup(tokens: Ints, count: int) -> list[int]:
    """Up to `count` tokens that followed the latest of the longest earlier matches of the last tokens."""
    size = len(tokens)
    ends = np.flatnonzero(tokens[: size - 1] == tokens[-1])
    matched = 1
    while len(ends) and matched < LONGEST_MATCH:
        longer = ends[ends >= matched]
        longer = longer[tokens[longer - matched] == tokens[size - 1 - matched]]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    if not len(ends) or matched < SHORTEST_MATCH:
        return []
    # The latest match may lie so close to the end that little follows it; what follows repeats then.
    follow = int(ends[-1]) + 1
    period = size - follow
    return [int(tokens[follow + offset % period]) for offset in range(count)]
