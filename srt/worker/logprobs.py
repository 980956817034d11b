"""Log probabilities of the model's own distribution: log softmax of logits as they come out of the model.

Nothing that sampling does to logits shows in them: no temperature, filter, penalty, bias or mask. So a number depends
on the tokens before it alone; the same request gets the same ones greedy or sampled, in its prompt or its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srt.messages import Logprobs, LogprobSpec, RowLogprobs, StepPlan, joined
from srt.worker.rows import Ints, Outcome, Rows, Step

PROMPT_BLOCK = 256
"""Positions of prompts whose logits exist at a time: those of a whole chunk would be as large as a model."""


def logprobs_of(logits: Tensor, tokens: Tensor, spec: LogprobSpec) -> Logprobs:
    """What `spec` wants of N positions: logits [N, V] and the tokens [N] int64 that follow them, on one device."""
    logits = logits.float()
    norm = logits.logsumexp(dim=-1, keepdim=True)
    values = (logits.gather(1, tokens[:, None]) - norm).clamp(max=0)  # rounding may say more than certain
    top_ids, top_values, listed = b"", b"", b""
    if spec.top:
        largest = logits.topk(spec.top, dim=-1)
        top_ids, top_values = _int32(largest.indices), _float32((largest.values - norm).clamp(max=0))
    if spec.ids:
        listed = _float32((logits[:, list(spec.ids)] - norm).clamp(max=0))
    return Logprobs(_int32(tokens), _float32(values), top_ids, top_values, listed)


def _int32(ids: Tensor) -> bytes:
    return ids.cpu().numpy().astype(np.dtype("<i4")).tobytes()


def _float32(values: Tensor) -> bytes:
    return values.to(torch.float32).cpu().numpy().astype(np.dtype("<f4"), copy=False).tobytes()


@dataclass
class Watch:
    """What a row wants: the prompt from position `prompt_from` on, which ends at `prompt_tokens`, and its answer."""

    spec: LogprobSpec
    prompt_tokens: int
    prompt_from: int | None


class Watches:
    """The rows whose requests want log probabilities. Costs nothing while there are none."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._watched: dict[int, Watch] = {}

    def apply(self, plan: StepPlan) -> None:
        """Take over what a plan says of rows."""
        for row in plan.freed_rows if self._watched else ():
            self._watched.pop(row, None)
        for start in plan.starts:
            self._watched.pop(start.row, None)
            spec = start.sampling.logprobs
            if spec is not None:
                self._watched[start.row] = Watch(spec, start.prompt_tokens, start.logprobs_from)

    def keep(self, step: Step, logits: Tensor) -> Tensor | None:
        """A copy of those logits [L, V] that `report` will need, before sampling overwrites them."""
        if not self._watched:
            return None
        watched = np.isin(step.emitting, list(self._watched))
        if not watched.any():
            return None
        return logits[torch.from_numpy(np.repeat(watched, step.drafts + 1)).to(logits.device)]

    def report(
        self, outcome: Outcome, kept: Tensor | None, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
    ) -> list[RowLogprobs]:
        """What the step has to say. `hidden` [T, H] is the residual stream of all its tokens.

        Every rank must come here: `logits_of` makes logits on all of them together.
        """
        if not self._watched:
            return []
        outputs = {} if kept is None else self._outputs(outcome, kept)
        told = []
        for at, row in enumerate(outcome.step.rows.tolist()):
            watch = self._watched.get(row)
            if watch is not None:
                prompt = self._prompt(outcome.step, at, watch, hidden, logits_of)
                if prompt is not None or at in outputs:
                    told.append(RowLogprobs(at, prompt, outputs.get(at)))
        return told

    def _outputs(self, outcome: Outcome, kept: Tensor) -> dict[int, Logprobs]:
        """By place in the plan: of the new tokens of each emitting row that is watched."""
        step, outputs = outcome.step, {}
        places = np.flatnonzero(step.emits)
        token_at = kept_at = 0
        for place, row, drafts, count in zip(
            places.tolist(), step.emitting.tolist(), step.drafts.tolist(), outcome.token_counts, strict=True
        ):
            watch = self._watched.get(row)
            if watch is not None:
                tokens = torch.tensor(outcome.token_ids[token_at : token_at + count], device=kept.device)
                outputs[place] = logprobs_of(kept[kept_at : kept_at + count], tokens, watch.spec)
                kept_at += drafts + 1
            token_at += count
        return outputs

    def _prompt(
        self, step: Step, at: int, watch: Watch, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
    ) -> Logprobs | None:
        """Of the positions of the prompt that follow tokens which this step has computed."""
        if watch.prompt_from is None:
            return None
        begin, start = step.batch.query_starts_list[at], int(step.starts[at])
        first, end = max(start + 1, watch.prompt_from), min(int(step.sure[at]) + 1, watch.prompt_tokens)
        if end == watch.prompt_tokens:
            watch.prompt_from = None
        if first >= end:
            return None
        following: Ints = self._rows.history(int(step.rows[at]))[first:end]
        parts = []
        for done in range(0, end - first, PROMPT_BLOCK):
            tokens = torch.from_numpy(following[done : done + PROMPT_BLOCK]).to(hidden.device)
            source = begin + first - 1 - start + done
            parts.append(logprobs_of(logits_of(hidden[source : source + len(tokens)]), tokens, watch.spec))
        return joined(parts)
