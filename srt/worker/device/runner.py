"""Steps on a device that works behind the host's back: plans are enqueued, results are picked up when they are there.

host    ──plan n──▶ enqueue n ──plan n + 1──▶ enqueue n + 1 ────────▶ result n ──▶
device              ├──── step n ─────────────────────────┤├──── step n + 1 ───…
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.batch import KVLayer
from srt.layers.ops import Ops
from srt.messages import ImageWork, StepPlan, StepResult
from srt.models.contract import LanguageModel
from srt.worker.device.careful import NOTHING_TOLD, HostRows, Told
from srt.worker.device.clock import Clock, Mark, clock_of
from srt.worker.device.graphs import Graphs, Record
from srt.worker.device.layout import Ints, Layout, layout_of_plan
from srt.worker.device.lengths import HostLengths
from srt.worker.device.mtp import DeviceProposer, NoDeviceGuesses
from srt.worker.device.passes import Passed, Passes
from srt.worker.device.rows import CONTRADICTED, DeviceOutcome, DeviceRows
from srt.worker.device.sampler import Sampler, TorchSampler
from srt.worker.row_images import NoImages, Part, RowImages


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
    told: Told


class DeviceRunner:
    """Obeys plans in the order of their numbers, as `srt.worker.runner.Runner` does; results come in that order."""

    def __init__(
        self,
        model: LanguageModel,
        kv: Sequence[KVLayer],
        rows: DeviceRows,
        ops: Ops,
        host: HostRows,
        images: RowImages | None = None,
        proposer: DeviceProposer | None = None,
        graph_shape: tuple[int, int] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        """`host` samples what `sampler` cannot. `graph_shape`: the guesses of a row in steps that are recorded, and
        the largest chunk of a prompt; None prepares nothing."""
        self._host = host
        guesses = NoDeviceGuesses() if proposer is None else proposer
        self.passes = Passes(model, kv, rows, ops, guesses, TorchSampler(ops) if sampler is None else sampler)
        self.rows = rows
        self.images: RowImages = NoImages() if images is None else images
        self.graphs = None if graph_shape is None else Graphs(self.passes, rows.nobody, *graph_shape)
        self._clock: Clock = clock_of(rows.device)
        self._enqueued: deque[Enqueued] = deque()
        self._last_step: int | None = None
        self._lengths = HostLengths(rows.nobody)

    @property
    def model(self) -> LanguageModel:
        """The main model."""
        return self.passes.model

    @model.setter
    def model(self, model: LanguageModel) -> None:
        self.passes.model = model

    @property
    def kv(self) -> Sequence[KVLayer]:
        """KV memory of the main model."""
        return self.passes.kv

    @property
    def proposer(self) -> DeviceProposer:
        """What guesses."""
        return self.passes.proposer

    @property
    def unprepared(self) -> bool:
        """Whether there is work left that makes later steps faster."""
        return self.graphs is not None and self.graphs.left > 0

    def prepare(self) -> None:
        """Do a piece of that work; takes some tens of milliseconds."""
        if self.graphs is not None and self.graphs.left:
            with torch.inference_mode():
                self.graphs.prepare_next()

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
            self.passes.sampling.apply(plan.starts)
            self._host.apply(plan)
            self.images.apply(plan)
            self.passes.proposer.start(plan.starts)
            self._lengths.start(plan.starts)
            if plan.rows:
                self._enqueue(plan, begin)
            else:
                self._keep(plan, torch.zeros(1, dtype=torch.int64), None, (begin, begin))

    def _enqueue(self, plan: StepPlan, begin: Mark) -> None:
        starts, kv_lens = self._lengths.advance(plan)
        images = self.images.place(_parts(plan, starts))
        record = self.graphs.find(plan) if self.graphs is not None and images is None else None
        if record is None:
            layout = layout_of_plan(plan, self.rows.device)
            passed = self.passes.compute(layout, self.passes.windows(layout), images, kv_lens)
        else:
            record.run_pass()
            passed = record.passed
        told, run_guess = NOTHING_TOLD, None
        if self._host.needed(plan):
            outcome, told = self._host.settle(passed, plan, self.passes)
        else:
            outcome, run_guess = self._settle(passed, plan, record)
        computed = self._clock.mark()
        if passed.windows is None or not plan.guess:
            self.passes.proposer.skip(outcome)
        elif run_guess is not None:
            run_guess()
        else:
            self.passes.guess(outcome, passed)
        self._keep(plan, self._clock.to_host(outcome.report), passed.step.layout, (begin, computed), told)

    def _keep(
        self, plan: StepPlan, report: Tensor, layout: Layout | None, marks: tuple[Mark, Mark], told: Told = NOTHING_TOLD
    ) -> None:
        """Remember a step until its result is there."""
        firsts, wanted = (np.zeros(0, np.int64), 0) if layout is None else (layout.host_firsts, len(layout.wanted))
        images = self.images.report()
        self._enqueued.append(Enqueued(plan, report, firsts, wanted, *marks, self._clock.mark(), images, told))

    def _settle(
        self, passed: Passed, plan: StepPlan, record: Record | None
    ) -> tuple[DeviceOutcome, Callable[[], None] | None]:
        """Sample, and let the rows go on; also how to play back the guesses that follow, if they are recorded."""
        emitting = [row for row, emits in zip(plan.rows, plan.emits, strict=True) if emits]
        sampling = self.passes.sampling
        greedy = sampling.greedy(emitting)
        if record is not None:
            ending = record.largest if greedy else record.drawn
            if ending is not None:
                ending.run()
                return ending.outcome, ending.run_guess
        if greedy:
            return self.passes.take_largest(passed), None
        return self.passes.draw(passed, filtered=sampling.filtered(emitting)), None

    def finished(self) -> Iterator[StepResult]:
        """Results that are there, oldest first.

        Raises: ProcessLost if a plan contradicted the rows' state, or if logits were not finite.
        """
        while self._enqueued and self._enqueued[0].end.passed():
            done = self._enqueued.popleft()
            yield _result(done, self._clock, 0 if self.graphs is None else self.graphs.bytes)


def _parts(plan: StepPlan, starts: Ints) -> list[Part]:
    """What the step computes of each row. Beyond its prompt a row may be further on: no image lies there."""
    drafts = plan.drafts if plan.drafts else [0] * len(plan.rows)
    parts, token = list[Part](), 0
    for row, start, count, emits, guesses in zip(
        plan.rows, starts.tolist(), plan.counts, plan.emits, drafts, strict=True
    ):
        parts.append(Part(row, start, start + count, token))
        token += count + guesses * emits
    return parts


def _result(done: Enqueued, clock: Clock, recorded_bytes: int) -> StepResult:
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
        endings=done.told.endings,
        logprobs=done.told.logprobs,
        recorded_bytes=recorded_bytes,
    )
