"""From replies to figures: one row a task family, and the table that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from srt.builtin.tasks import Example
from srt.evaluation.client import Reply

HEADINGS = ("family", "accuracy", "right", "errors", "tokens/answer", "tokens/step", "p50 s", "p99 s")


@dataclass(frozen=True)
class Asked:
    """A problem and what the server made of it."""

    example: Example
    reply: Reply

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.reply.is_right(self.example)


@dataclass(frozen=True)
class Score:
    """Figures over the replies to one family, or to all; latencies are those of whole answers."""

    family: str
    count: int
    right: int
    errors: int
    answer_tokens: float
    step_tokens: float
    p50_s: float
    p99_s: float

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.count

    def cells(self) -> tuple[str, ...]:
        """The row of the table, under `HEADINGS`."""
        return (
            self.family,
            f"{100 * self.accuracy:.1f} %",
            f"{self.right}/{self.count}",
            str(self.errors),
            f"{self.answer_tokens:.1f}",
            f"{self.step_tokens:.2f}",
            f"{self.p50_s:.3f}",
            f"{self.p99_s:.3f}",
        )


def score(family: str, asked: Sequence[Asked]) -> Score:
    """Figures of at least one reply.

    A server that does not count decoding steps takes one for each token. Requests that failed have no latency.
    """
    replies = [item.reply for item in asked if not item.reply.error]
    tokens = sum(reply.tokens for reply in replies)
    steps = sum(reply.tokens if reply.steps is None else reply.steps for reply in replies)
    p50, p99 = np.percentile([reply.seconds for reply in replies], (50, 99)) if replies else (np.nan, np.nan)
    return Score(
        family=family,
        count=len(asked),
        right=sum(item.right for item in asked),
        errors=len(asked) - len(replies),
        answer_tokens=tokens / max(1, len(replies)),
        step_tokens=tokens / max(1, steps),
        p50_s=float(p50),
        p99_s=float(p99),
    )


def table(scores: Iterable[Score]) -> str:
    """The table: names to the left, figures to the right."""
    rows = [HEADINGS, *(row.cells() for row in scores)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
