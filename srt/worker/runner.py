"""One step: plan in, forward pass, sampled tokens out. Needs no socket, so tests drive it directly."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.ops import Ops
from srt.messages import RowLogprobs, StepPlan, StepResult
from srt.models.contract import LanguageModel
from srt.worker.grammars import NoGrammars, RowGrammars
from srt.worker.logprobs import Watches
from srt.worker.proposer import NoGuesses, Proposer
from srt.worker.row_images import NoImages, Part, RowImages
from srt.worker.rows import Outcome, Rows, Step
from srt.worker.sampler import sample


class Runner:
    """Obeys plans in the order of their numbers. Every rank has one and samples the same tokens."""

    def __init__(
        self,
        model: LanguageModel,
        kv: Sequence[KVLayer],
        rows: Rows,
        ops: Ops,
        images: RowImages | None = None,
        proposer: Proposer | None = None,
        grammars: RowGrammars | None = None,
    ) -> None:
        self.model, self.kv, self.rows, self.ops = model, kv, rows, ops
        self.images: RowImages = NoImages() if images is None else images
        self.proposer: Proposer = NoGuesses() if proposer is None else proposer
        self.grammars: RowGrammars = NoGrammars() if grammars is None else grammars
        self.watches = Watches(rows)
        self._last_step: int | None = None
        self._results: list[StepResult] = []

    @property
    def busy(self) -> bool:
        """Whether results are still to be picked up."""
        return bool(self._results)

    @property
    def unprepared(self) -> bool:
        """Whether there is work left that makes later steps faster: never."""
        return False

    def prepare(self) -> None:
        """Nothing to prepare."""

    def submit(self, plan: StepPlan) -> None:
        """Run one plan now. Raises: ProcessLost as `step` does."""
        self._results.append(self.step(plan))

    def finished(self) -> list[StepResult]:
        """Results that were not picked up, oldest first."""
        results, self._results = self._results, []
        return results

    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan.

        Raises: ProcessLost if its number is not the last one plus one (the first may have any), if it contradicts
            the rows' state, or if logits are not finite.
        """
        started = time.perf_counter_ns()
        if self._last_step is not None and plan.step != self._last_step + 1:
            raise ProcessLost(f"plan {plan.step} came after plan {self._last_step}, expected {self._last_step + 1}")
        self._last_step = plan.step
        with torch.inference_mode():
            self.rows.apply(plan)
            self.watches.apply(plan)
            self.images.apply(plan)
            self.grammars.apply(plan)
            self.proposer.start(plan.starts)
            if not plan.rows:
                return StepResult(plan.step, [], [], _us_since(started), images=self.images.report())
            outcome, hidden, logprobs = self._compute(plan)
            endings = self.grammars.advance(outcome)
            computed = time.perf_counter_ns()
            if plan.guess:
                self.proposer.propose(outcome, hidden)
            else:
                self.proposer.skip(outcome)
        drafted = outcome.step.drafts.tolist() if plan.drafts else []
        return StepResult(
            plan.step,
            outcome.token_ids,
            outcome.token_counts,
            _us_since(started),
            images=self.images.report(),
            drafted=drafted,
            guess_us=_us_since(computed),
            endings=endings,
            logprobs=logprobs,
        )

    def _compute(self, plan: StepPlan) -> tuple[Outcome, Tensor, list[RowLogprobs]]:
        step = self.rows.begin(plan)
        images = self.images.place(_parts(step))
        batch = step.batch if images is None else replace(step.batch, images=images)
        hidden = self.model.forward(batch, self.kv)
        sampled, kept = np.empty(0, np.int64), None
        if len(step.emitting):
            logits = self.model.logits(_wanted(hidden, step.batch))
            kept = self.watches.keep(step, logits)
            sampled = sample(logits, self.rows.sampling(step), self.ops, self.grammars.masks(step)).numpy()
        outcome = self.rows.end(step, sampled)
        return outcome, hidden, self.watches.report(outcome, kept, hidden, self.model.logits)


def _us_since(begun_ns: int) -> int:
    """Microseconds since a reading of the clock."""
    return (time.perf_counter_ns() - begun_ns) // 1_000


def _parts(step: Step) -> Iterator[Part]:
    """What a step computes, row by row."""
    spans = zip(step.rows.tolist(), step.starts.tolist(), step.ends.tolist(), strict=True)
    for (row, start, end), token in zip(spans, step.batch.query_starts_list, strict=False):
        yield Part(row, start, end, token)


def _wanted(hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """Rows of the residual stream whose logits are wanted; all of them when every token's are."""
    return hidden if len(batch.logit_tokens) == len(hidden) else hidden[batch.logit_tokens]
