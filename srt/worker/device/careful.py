"""Steps with rows that want more than a draw: penalties, biases, grammars, log probabilities.

What these need, they have on the host (`srt/worker/runner.py`). So such a step waits for the device, brings the host's
rows up to date, samples there, and goes on. It costs what the host costs; steps without such rows know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from srt.layers.ops import TorchOps
from srt.messages import RowEnding, RowLogprobs, SamplingSpec, StepPlan
from srt.worker.device.layout import upload
from srt.worker.device.passes import Passed, Passes
from srt.worker.device.rows import DeviceOutcome
from srt.worker.grammars import RowGrammars
from srt.worker.logprobs import Watches
from srt.worker.rows import Ints, Rows, Step
from srt.worker.sampler import sample


@dataclass(frozen=True)
class Told:
    """What a careful step says beside its tokens."""

    endings: list[RowEnding]
    logprobs: list[RowLogprobs]


NOTHING_TOLD = Told([], [])


def plain(spec: SamplingSpec) -> bool:
    """Whether the device can sample it: a temperature and filters, nothing else."""
    drawn = SamplingSpec(spec.temperature, spec.top_k, spec.top_p, spec.min_p, spec.seed)
    return spec == drawn


class HostRows:
    """The host's side of rows. `Rows` there lag behind the device until a step needs them."""

    def __init__(self, rows: Rows, grammars: RowGrammars) -> None:
        self._rows, self._grammars = rows, grammars
        self._watches = Watches(rows)
        self._ops = TorchOps()
        self._careful: set[int] = set()

    def apply(self, plan: StepPlan) -> None:
        """Take over what a plan says of rows."""
        self._rows.apply(plan)
        self._watches.apply(plan)
        self._grammars.apply(plan)
        self._careful.difference_update(plan.freed_rows)
        for start in plan.starts:
            self._careful.discard(start.row)
            if not plain(start.sampling):
                self._careful.add(start.row)

    def needed(self, plan: StepPlan) -> bool:
        """Whether a step has a row that wants more than a draw."""
        return bool(self._careful) and not self._careful.isdisjoint(plan.rows)

    def settle(self, passed: Passed, plan: StepPlan, passes: Passes) -> tuple[DeviceOutcome, Told]:
        """Sample a pass on the host, and let the rows go on there and on the device.

        Raises: ProcessLost if the plan contradicts the rows, or if logits are not finite.
        """
        layout = passed.step.layout
        self._catch_up(np.array(plan.rows, np.int64), passes)
        step = self._rows.begin(plan)
        step = replace(step, batch=replace(step.batch, query_starts_list=layout.query_starts_list))
        places = _wanted(step, layout.host_firsts)
        (chosen,) = upload([places], passes.rows.device)
        sampled, kept = np.zeros(0, np.int64), None
        if len(places):
            logits = passed.logits[chosen]
            kept = self._watches.keep(step, logits)
            columns, masks = self._rows.sampling(step), self._grammars.masks(step)
            sampled = sample(logits.float().cpu(), columns, self._ops, masks).numpy()
        outcome = self._rows.end(step, sampled)
        told = Told(
            self._grammars.advance(outcome), self._watches.report(outcome, kept, passed.hidden, passes.model.logits)
        )
        whole = np.zeros(len(layout.wanted), np.int64)
        whole[places] = sampled
        (tokens,) = upload([whole], passes.rows.device)
        return passes.rows.end(passed.step, tokens, torch.ones_like(tokens, dtype=torch.int32)), told

    def _catch_up(self, rows: Ints, passes: Passes) -> None:
        """Fetch what the device has known longer than the host of these rows."""
        device = passes.rows
        (numbers,) = upload([rows], device.device)
        state = device.state[numbers].cpu().numpy()
        known = self._rows.known(rows)
        missing = state[:, 1] + state[:, 2] - known
        width = max(0, int(missing.max(initial=0)))
        (first,) = upload([known], device.device)
        places = first[:, None] + torch.arange(width, device=device.device)
        tokens = device.tokens[numbers[:, None], places.clamp(max=device.tokens.shape[1] - 1)].cpu().numpy()
        self._rows.catch_up(rows, state, tokens)


def _wanted(step: Step, firsts: Ints) -> Ints:
    """Which of a layout's logits a step of the host wants: it has no more guesses than there are."""
    widths = step.drafts + 1
    own = np.cumsum(widths) - widths
    places: Ints = np.arange(int(widths.sum())) + np.repeat(firsts[: len(widths)] - own, widths)
    return places
