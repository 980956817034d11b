"""One step: plan in, forward pass, sampled tokens out. Needs no socket, so tests drive it directly."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from srt.errors import ProcessLost
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.ops import Ops
from srt.messages import StepPlan, StepResult
from srt.models.contract import LanguageModel
from srt.worker.row_images import NoImages, Part, RowImages
from srt.worker.rows import Rows, Step
from srt.worker.sampler import sample


class Runner:
    """Obeys plans in the order of their numbers. Every rank has one and samples the same tokens."""

    def __init__(
        self, model: LanguageModel, kv: Sequence[KVLayer], rows: Rows, ops: Ops, images: RowImages | None = None
    ) -> None:
        self.model, self.kv, self.rows, self.ops = model, kv, rows, ops
        self.images: RowImages = NoImages() if images is None else images
        self._last_step: int | None = None

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
            self.images.apply(plan)
            token_ids = self._compute(plan) if plan.rows else []
        elapsed_us = (time.perf_counter_ns() - started) // 1_000
        return StepResult(plan.step, token_ids, [1] * len(token_ids), elapsed_us, self.images.report())

    def _compute(self, plan: StepPlan) -> list[int]:
        step = self.rows.begin(plan)
        images = self.images.place(_parts(step, plan))
        batch = step.batch if images is None else replace(step.batch, images=images)
        hidden = self.model.forward(batch, self.kv)
        token_ids: list[int] = []
        if len(step.emitting):
            logits = self.model.logits(_wanted(hidden, step.batch))
            token_ids = sample(logits, self.rows.sampling(step), self.ops).tolist()
        self.rows.end(step, token_ids)
        return token_ids


def _parts(step: Step, plan: StepPlan) -> Iterator[Part]:
    """What a step computes, row by row."""
    for row, end, count, token in zip(plan.rows, step.ends, plan.counts, step.batch.query_starts_list, strict=False):
        yield Part(row, int(end) - count, int(end), token)


def _wanted(hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """Rows of the residual stream whose logits are wanted; all of them when every token's are."""
    return hidden if len(batch.logit_tokens) == len(hidden) else hidden[batch.logit_tokens]
