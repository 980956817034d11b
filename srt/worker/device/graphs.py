"""What is made ready while a server is idle: kernels for prompts of all sizes, and CUDA graphs of decodes.

CUDA graphs: steps of decodes recorded once for a number of rows, and played back for others.

A record is made for rows that belong to nobody. To play it, the rows of a plan are written where it reads them, and it
is filled up with nobody where the plan has fewer. What it leaves is read from the same places each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from srt.configs.memory import record_sizes
from srt.configs.startup_table import human
from srt.messages import StepPlan
from srt.worker.device.layout import layout_of, packed_for
from srt.worker.device.passes import Passed, Passes
from srt.worker.device.rows import DeviceOutcome

log = logging.getLogger(__name__)

PROMPTS: Final = (16, 64, 256, 1024)
"""Sizes of prompts, in tokens, that need kernels of their own; the largest chunk is computed once before the start."""
MOST_FILLED: Final = 2
"""A record of more than so many times the rows is not played: while smaller ones are missing, running is quicker."""
Replay = Callable[[], None]


@dataclass(frozen=True)
class Ending:
    """What may follow a recorded pass: its tokens are chosen in one way, then rows guess behind them."""

    outcome: DeviceOutcome
    run: Replay
    run_guess: Replay | None


@dataclass
class Record:
    """A step of decodes: the pass, and behind it either the largest logits or draws of rows of any kind."""

    passed: Passed
    run_pass: Replay
    largest: Ending
    drawn: Ending | None = None
    """None until it is recorded."""

    @property
    def size(self) -> int:
        """Rows that there is room for."""
        return len(self.passed.step.layout.rows)

    def load(self, rows: list[int], drafts: list[int], nobody: int) -> None:
        """Let the next playback be for these rows."""
        layout = self.passed.step.layout
        missing = self.size - len(rows)
        columns = [np.array(rows + [nobody] * missing), np.array(drafts + [0] * missing)]
        layout.changing.copy_(packed_for(columns, layout.rows.device), non_blocking=True)


def largest_first(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the most rows before all others, whose order stays.

    What the largest record works in serves all others; in rising order each outgrows what is free by then.
    """
    most = max((rows for rows, _ in shapes), default=0)
    return sorted(shapes, key=lambda shape: shape[0] != most)


class Graphs:
    """Records of decodes by number of rows, without guesses and with as many as the drafter has."""

    def __init__(self, passes: Passes, most_rows: int, depth: int, chunk: int) -> None:
        self._passes = passes
        self._rehearsals = [(size, False) for size in PROMPTS if size < chunk] + [(1, True)]
        self._records: dict[tuple[int, int], Record] = {}
        self._sizes = record_sizes(most_rows)
        kinds = sorted({0, depth}, reverse=True)
        self._left = largest_first([(size, drafts) for size in self._sizes for drafts in kinds])
        self._undrawn: list[Record] = []
        self._draws = True
        self._pool: Any = None
        self.bytes = 0
        """What all records together took of the GPU's memory."""

    @property
    def left(self) -> int:
        """Pieces of work for `prepare_next`."""
        return len(self._rehearsals) + (1 + self._draws) * len(self._left) + len(self._undrawn)

    def prepare_next(self) -> None:
        """Rehearse one more size of prompts, or else record one more part of a step. Waits for the device.

        If the GPU is full, records for fewer rows than the one that failed are still made; none if a rehearsal failed.
        """
        least, before = self._next_size(), self.left
        try:
            if self._rehearsals:
                tokens, draws = self._rehearsals.pop(0)
                self._passes.rehearse(tokens, draws=draws)
            else:
                self.record_next()
        except torch.OutOfMemoryError as error:
            self._rehearsals.clear()
            self._left = [shape for shape in self._left if shape[0] < least]
            self._undrawn = [record for record in self._undrawn if record.size < least]
            log.warning("%d parts of steps are not recorded, the GPU is full: %s", before - self.left, error)

    def _next_size(self) -> int:
        """Rows of the next record; 0 while there are rehearsals before it."""
        if self._rehearsals:
            return 0
        return self._left[0][0] if self._left else self._undrawn[0].size

    def keep(self, sizes: Container[int], *, draws: bool = False) -> None:
        """Rehearse nothing more, and make no more records but those for these numbers of rows, with draws if asked."""
        self._draws = draws
        self._rehearsals.clear()
        self._left = largest_first([shape for shape in self._left if shape[0] in sizes])

    def find(self, plan: StepPlan) -> Record | None:
        """The record for a plan, its rows loaded; None if there is none."""
        rows = len(plan.rows)
        if not rows or max(plan.counts) > 1 or not all(plan.emits):
            return None
        drafts = max(plan.drafts, default=0)
        fitting = min((shape for shape in self._records if shape[0] >= rows and shape[1] >= drafts), default=None)
        if fitting is None or fitting[0] > MOST_FILLED * rows:
            return None
        record = self._records[fitting]
        record.load(plan.rows, plan.drafts or [0] * rows, self._passes.rows.nobody)
        return record

    def record_next(self) -> None:
        """Record one more step, or, when all are, one more's draws. Waits for the device; takes some tens of
        milliseconds."""
        if self._left:
            size, drafts = self._left.pop(0)
            record = self._record(size, drafts)
            self._records[size, drafts] = record
            if self._draws:
                self._undrawn.append(record)
        else:
            record = self._undrawn.pop(0)
            record.load([], [], self._passes.rows.nobody)  # whose rows it was played for last, may be in use
            record.run_pass()
            record.drawn = self._ending(record.passed, lambda: self._passes.draw(record.passed, filtered=True))
        if not self.left:
            log.info("%d kinds of steps are recorded, which take %s", len(self._records), human(self.bytes))

    def _record(self, size: int, drafts: int) -> Record:
        passes, rows = self._passes, self._passes.rows
        ones, nobody = np.ones(size, np.int64), np.full(size, rows.nobody)
        layout = layout_of(nobody, ones, ones.astype(np.bool_), ones * drafts, rows.device)
        windows = passes.windows(layout)
        passes.compute(layout, windows)  # compiles what has not been compiled
        passes.wait()
        run_pass, passed = self._captured(lambda: passes.compute(layout, windows))
        run_pass()
        return Record(passed, run_pass, self._ending(passed, lambda: passes.take_largest(passed)))

    def _ending(self, passed: Passed, choose: Callable[[], DeviceOutcome]) -> Ending:
        """Record what follows a pass."""
        outcome = choose()
        if passed.windows is not None:
            self._passes.guess(outcome, passed)
        self._passes.wait()
        run, outcome = self._captured(choose)
        run_guess = None
        if passed.windows is not None:
            run_guess, _ = self._captured(lambda: self._passes.guess(outcome, passed))
        return Ending(outcome, run, run_guess)

    def _captured(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        """Record what `work` enqueues; returns how to play it back, and what it returned."""
        torch.cuda.empty_cache()  # recording begins with it: what it gives back is not to be set against the record
        free, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            left: Any = work()
        self._pool = graph.pool()
        self.bytes += max(0, free - torch.cuda.mem_get_info()[0])  # another process may have given memory back
        return graph.replay, left
