"""Rows that are read and written by one kernel each, against the plain ones: in the interpreter, or on a GPU."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from srt.messages import PageUpdate, RowStart, SamplingSpec, StepPlan
from srt.worker.device import fused_rows
from srt.worker.device.fused_rows import FusedRows
from srt.worker.device.layout import layout_of_plan
from srt.worker.device.rows import DeviceRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS, PAGE, DRAFTS = 2, 4, 3


def both() -> tuple[DeviceRows, FusedRows]:
    """Three rows: one in its prompt, two that decode, of which one has guesses."""
    found = []
    for kind in (DeviceRows, FusedRows):
        rows = kind(DEVICE, GROUPS, PAGE, 64, 6, DRAFTS)
        starts = [
            RowStart(row, (np.arange(count, dtype="<i4") * 7 + row).tobytes(), computed, count, SamplingSpec())
            for row, count, computed in ((4, 9, 4), (1, 17, 16), (2, 6, 5))
        ]
        pages = [
            PageUpdate(group, [4, 1, 2], [0, 0, 0], [3, 6, 3], [5 + group, *range(20, 31)]) for group in range(GROUPS)
        ]
        rows.apply(StepPlan(1, [], [], [], starts, pages))
        for offset, token in enumerate((31, 32, 33)):
            rows.guess(torch.tensor([2], device=DEVICE), offset, torch.tensor([token], device=DEVICE))
        found.append(rows)
    plain, fused = found
    assert isinstance(fused, FusedRows)
    return plain, fused


def same(found: object, expected: object) -> None:
    """All tensors of two records are equal."""
    for field in fields(expected):  # type: ignore[arg-type]
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, Tensor):
            assert ours.tolist() == theirs.tolist(), field.name
        elif isinstance(theirs, tuple):
            assert [one.tolist() for one in ours] == [one.tolist() for one in theirs], field.name


PLANS = {
    "mixed": StepPlan(2, [2, 4, 1], [1, 3, 1], [True, False, True]),
    "decodes": StepPlan(2, [1, 2], [1, 1], [True, True]),
    "guesses": StepPlan(2, [1, 2], [1, 1], [True, True], drafts=[3, 3]),
    "prompts": StepPlan(2, [4, 1], [5, 1], [True, True]),
    "wrong": StepPlan(2, [1, 4], [2, 1], [True, True]),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("right", [0, 2, 3])
def test_one_kernel_does_what_the_plain_rows_do(name: str, right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "prompts":
        monkeypatch.setattr(fused_rows, "MOST_TOKENS", 4)
    outcomes, steps, kinds = [], [], both()
    for rows in kinds:
        layout = layout_of_plan(PLANS[name], DEVICE)
        step = rows.begin(layout)
        wanted = len(layout.wanted)
        sampled = torch.arange(40, 40 + wanted, device=DEVICE)
        if name == "guesses":
            sampled[4 : 4 + right] = torch.tensor([31, 32, 33], device=DEVICE)[:right]
        finite = torch.ones(wanted, dtype=torch.int32, device=DEVICE)
        finite[0] = right > 0
        outcomes.append(rows.end(step, sampled, finite))
        steps.append(step)
    same(steps[1], steps[0])
    same(steps[1].batch, steps[0].batch)
    same(outcomes[1], outcomes[0])
    assert kinds[1].state.tolist() == kinds[0].state.tolist()
    assert kinds[1].tokens.tolist() == kinds[0].tokens.tolist()
    fault = int(outcomes[1].report[-1])
    assert fault == (name == "wrong") + 2 * (right == 0)
