"""The draft modules against published numbers, and against their formulas written down once more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srt.messages import PageUpdate, RowStart, StepPlan
from srt.worker.mtp import WindowProposer
from srt.worker.runner import Runner
from srt.worker.startup import Picks, reference_backends, start
from tests.models.test_golden_vectors import PROMPT, ROUNDING
from tests.support.checkpoints import write_golden
from tests.support.steps import GREEDY, MTP, plan_for

DRAFTS = [44, 43, 24]
LOGITS = (
    (0.59977, 0.07420, -0.26661, 0.61999),
    (-0.00967, 1.12302, -0.23897, 0.18137),
    (0.03167, 1.10353, -2.11511, -0.54400),
)
"""Of the last position, first four, module by module."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden(tmp_path_factory.mktemp("golden"), mtp=True)


@pytest.fixture(params=["fastest", "reference"])
def runner(request: pytest.FixtureRequest, golden: Path, tmp_path: Path) -> Runner:
    picks: Picks | None = None if request.param == "fastest" else reference_backends("for comparison")
    started = start(plan_for(golden, page_size=4, drafting=MTP), tmp_path, 0, lambda done, total: None, picks)
    assert isinstance(started.runner, Runner)
    return started.runner


def test_41_drafts_and_their_logits_are_the_published_ones(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = runner.proposer
    assert isinstance(proposer, WindowProposer)
    model, seen = proposer._model, list[torch.Tensor]()
    logits = model.logits

    def spy(module: int, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(logits(module, hidden))
        return seen[-1]

    monkeypatch.setattr(model, "logits", spy)
    ids = torch.tensor(PROMPT, dtype=torch.int32).numpy().tobytes()
    pages = [PageUpdate(group, [0], [0], [7], list(range(1, 8))) for group in range(3)]
    result = runner.step(StepPlan(1, [0], [24], [True], [RowStart(0, ids, 0, 24, GREEDY)], pages))
    assert result.token_ids == [103]
    assert [int(row.argmax()) for row in seen] == DRAFTS
    assert torch.allclose(torch.stack([row[0, :4] for row in seen]), torch.tensor(LOGITS), atol=ROUNDING)
