"""Steps on a device that works behind the host's back: plans are enqueued, results are picked up when they are there.

host    ──plan n──▶ enqueue n ──plan n + 1──▶ enqueue n + 1 ────────▶ result n ──▶
device              ├──── step n ─────────────────────────┤├──── step n + 1 ───…
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.batch import KVLayer, PlacedFeatures
from srt.layers.ops import Ops
from srt.messages import ImageWork, StepPlan, StepResult
from srt.models.contract import LanguageModel
from srt.worker.device.clock import Clock, Mark, clock_of
from srt.worker.device.layout import Ints, Layout, layout_of_plan
from srt.worker.device.mtp import DeviceProposer, NoDeviceGuesses
from srt.worker.device.rows import CONTRADICTED, DeviceOutcome, DeviceRows, DeviceStep
from srt.worker.device.sampler import RowSampling, fault_of, sample
from srt.worker.row_images import NoImages, Part, RowImages


@dataclass(frozen=True)
class Passed:
    """A pass of the main model: hidden states [T, H] and wanted logits [L, V], and the windows of its guesses."""

    step: DeviceStep
    hidden: Tensor
    logits: Tensor
    windows: Layout | None


@dataclass(frozen=True)
class Enqueued:
    """A step that the device has been given. `report` is on its way to the host and there once `end` has passed."""

    plan: StepPlan
    report: Tensor
    firsts: Ints
    """Where the logits of each row that samples begin in the report."""
    wanted: int
    begin: Mark
    computed: Mark
    end: Mark
    images: ImageWork | None


class Recorded(Protocol):
    """Passes that were recorded for batches of some shapes."""

    def run(self, plan: StepPlan) -> Passed | None:
        """Run the main model over the rows of a plan without images; None if there is no record of its shape."""
        ...


class NothingRecorded:
    """Every pass is run kernel by kernel."""

    def run(self, plan: StepPlan) -> Passed | None:
        """There is no record."""
        return None


class DeviceRunner:
    """Obeys plans in the order of their numbers, as `srt.worker.runner.Runner` does; results come in that order."""

    def __init__(
        self,
        model: LanguageModel,
        kv: Sequence[KVLayer],
        rows: DeviceRows,
        ops: Ops,
        images: RowImages | None = None,
        proposer: DeviceProposer | None = None,
        recorded: Recorded | None = None,
    ) -> None:
        self.model, self.kv, self.rows, self.ops = model, kv, rows, ops
        self.images: RowImages = NoImages() if images is None else images
        self.proposer: DeviceProposer = NoDeviceGuesses() if proposer is None else proposer
        self.recorded: Recorded = NothingRecorded() if recorded is None else recorded
        self._sampling = RowSampling(rows.device, rows.nobody)
        self._clock: Clock = clock_of(rows.device)
        self._enqueued: deque[Enqueued] = deque()
        self._last_step: int | None = None
        self._prompted = np.zeros(rows.nobody, np.int64)

    @property
    def busy(self) -> bool:
        """Whether results are still to come."""
        return bool(self._enqueued)

    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan and wait for its result.

        Raises: ProcessLost as `submit` and `finished` do.
        """
        self.submit(plan)
        self._enqueued[-1].end.wait()
        *_, result = self.finished()
        return result

    def submit(self, plan: StepPlan) -> None:
        """Enqueue one plan; does not wait for the device.

        Raises: ProcessLost if its number is not the last one plus one (the first may have any), or if it starts rows
            or writes pages that cannot be.
        """
        if self._last_step is not None and plan.step != self._last_step + 1:
            raise ProcessLost(f"plan {plan.step} came after plan {self._last_step}, expected {self._last_step + 1}")
        if len(set(plan.rows)) < len(plan.rows):
            raise ProcessLost(f"step {plan.step} names a row twice: {sorted(plan.rows)}")
        self._last_step = plan.step
        with torch.inference_mode():
            begin = self._clock.mark()
            self.rows.apply(plan)
            self._sampling.apply(plan.starts)
            self.images.apply(plan)
            self.proposer.start(plan.starts)
            for start in plan.starts:
                self._prompted[start.row] = start.computed
            if plan.rows:
                self._enqueue(plan, begin)
            else:
                self._keep(plan, torch.zeros(1, dtype=torch.int64), None, (begin, begin))

    def _enqueue(self, plan: StepPlan, begin: Mark) -> None:
        images = self.images.place(self._parts(plan))
        passed = self.recorded.run(plan) if images is None else None
        if passed is None:
            passed = self.compute(layout_of_plan(plan, self.rows.device), images)
        outcome = self._settle(passed, plan)
        computed = self._clock.mark()
        if passed.windows is None or not plan.guess:
            self.proposer.skip(outcome)
        else:
            self.proposer.propose(outcome, passed.windows, passed.hidden)
        self._keep(plan, self._clock.to_host(outcome.report), passed.step.layout, (begin, computed))

    def _keep(self, plan: StepPlan, report: Tensor, layout: Layout | None, marks: tuple[Mark, Mark]) -> None:
        """Remember a step until its result is there."""
        firsts, wanted = (np.zeros(0, np.int64), 0) if layout is None else (layout.host_firsts, len(layout.wanted))
        images = self.images.report()
        self._enqueued.append(Enqueued(plan, report, firsts, wanted, *marks, self._clock.mark(), images))

    def compute(self, layout: Layout, images: PlacedFeatures | None = None) -> Passed:
        """The main model over a layout's rows."""
        step = self.rows.begin(layout)
        hidden = self.model.forward(replace(step.batch, images=images), self.kv)
        everything = len(layout.wanted) == layout.tokens
        logits = self.model.logits(hidden if everything else hidden[layout.wanted])
        return Passed(step, hidden, logits, self.proposer.windows(layout))

    def _settle(self, passed: Passed, plan: StepPlan) -> DeviceOutcome:
        """Sample, and let the rows go on."""
        step, layout, logits = passed.step, passed.step.layout, passed.logits
        widths = layout.host_drafts + 1
        if not len(widths):
            return self.rows.end(step, layout.wanted, step.fault)
        fault = step.fault + fault_of(logits)
        emitting = np.array(plan.rows, np.int64)[np.array(plan.emits, np.bool_)]
        if self._sampling.greedy(emitting.tolist()):
            return self.rows.end(step, self.ops.sample_greedy(logits), fault)
        widths = widths[: len(emitting)]
        positions = step.known[layout.wanted_rows] + layout.wanted_offsets
        draws, bans = self._sampling.draws(emitting, widths), self._sampling.bans(emitting, widths)
        return self.rows.end(step, sample(logits, positions, draws, bans, self.ops), fault)

    def _parts(self, plan: StepPlan) -> list[Part]:
        """What the step computes of each row. Beyond its prompt a row may be further on: no image lies there."""
        starts, rows = self._prompted[plan.rows], plan.rows
        self._prompted[rows] += plan.counts
        drafts = plan.drafts if plan.drafts else [0] * len(rows)
        parts, token = list[Part](), 0
        for row, start, count, emits, guesses in zip(
            rows, starts.tolist(), plan.counts, plan.emits, drafts, strict=True
        ):
            parts.append(Part(row, start, start + count, token))
            token += count + guesses * emits
        return parts

    def finished(self) -> Iterator[StepResult]:
        """Results that are there, oldest first.

        Raises: ProcessLost if a plan contradicted the rows' state, or if logits were not finite.
        """
        while self._enqueued and self._enqueued[0].end.passed():
            done = self._enqueued.popleft()
            yield _result(done, self._clock)


def _result(done: Enqueued, clock: Clock) -> StepResult:
    """A step's report as the message that the scheduler reads. The report may hold more rows than the plan."""
    plan, report = done.plan, done.report.numpy()
    if report[-1]:
        what = "a row cannot compute what it is asked to" if report[-1] & CONTRADICTED else "logits are not finite"
        raise ProcessLost(f"step {plan.step} of {len(plan.rows)} rows: {what}")
    emitting = sum(plan.emits)
    counts, drafted = (column[:emitting].tolist() for column in report[done.wanted : -1].reshape(2, -1))
    sampled = report[: done.wanted].tolist()
    return StepResult(
        plan.step,
        [
            token
            for first, count in zip(done.firsts.tolist(), counts, strict=False)
            for token in sampled[first : first + count]
        ],
        counts,
        clock.between_us(done.begin, done.end),
        images=done.images,
        drafted=drafted if plan.drafts else [],
        guess_us=clock.between_us(done.computed, done.end),
    )
