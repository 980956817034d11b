"""The text model against published numbers that need no other implementation to reproduce."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srt.messages import PageUpdate, RowStart, StepPlan
from srt.models.step3p7_text import Step3p7Text
from srt.worker.runner import Runner
from srt.worker.startup import Picks, reference_backends, start
from tests.support.checkpoints import golden_tensor, write_golden
from tests.support.steps import GREEDY, Steps, plan_for

PROMPT = [(37 * k + 11) % 100 for k in range(24)]
FIRST = (1.40809, 0.78286, -1.40825, 0.72341, 0.63655, -1.09956)
LAST = (-0.08862, -1.66774, 1.51699, -1.01642, -2.68263, -0.97628)
ARGMAX = [18, 18, 14, 14, 125, 59, 67, 103, 35, 110, 81, 25, 35, 70, 28, 99, 37, 49, 36, 8, 119, 89, 24, 103]
CONTINUATION = [103, 8, 13, 103, 65, 50, 65, 104]
RESIDUALS = (
    (-0.16679, -0.22874, 0.20978, 0.14878),
    (-1.00964, 0.62239, 0.30704, 1.16503),
    (-2.06907, -0.77018, -0.96377, 0.63048),
    (-4.20087, 5.13535, 0.93016, 1.08822),
    (-2.25501, 4.88596, 0.49905, 1.39312),
    (-2.39775, 4.72303, 0.32149, 1.61043),
)
"""The residual stream at the last position: embeddings, then after each layer; first four dimensions."""
ROUNDING = 6e-6
"""The vectors are printed with five decimals."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(params=["fastest", "reference"])
def picks(request: pytest.FixtureRequest) -> Picks | None:
    return None if request.param == "fastest" else reference_backends("for comparison")


@pytest.fixture
def steps(golden: Path, tmp_path: Path, picks: Picks | None) -> Steps:
    return Steps(plan_for(golden, page_size=4), tmp_path, picks=picks)


def test_the_weights_that_names_stand_for_are_the_published_ones() -> None:
    q = golden_tensor("model.layers.0.self_attn.q_proj.weight", (64, 64)).flatten()[:4]
    assert torch.allclose(q, torch.tensor([0.17922, 0.23989, -0.19897, -0.13736]), atol=ROUNDING)
    bias = golden_tensor("model.layers.2.moe.router_bias", (8,))
    expected = [0.25516, 0.37650, 0.49878, -0.37799, -0.25382, -0.12870, -0.00263, 0.12438]
    assert torch.allclose(bias, torch.tensor(expected), atol=ROUNDING)


def test_logits_are_the_published_ones(steps: Steps) -> None:
    steps.add(0, PROMPT)
    steps.prefill(0)
    logits = steps.all_logits(0)
    assert torch.allclose(logits[0, :6], torch.tensor(FIRST), atol=ROUNDING)
    assert torch.allclose(logits[23, :6], torch.tensor(LAST), atol=ROUNDING)
    assert logits.argmax(-1).tolist() == ARGMAX
    assert logits.abs().mean().item() == pytest.approx(0.907124, abs=1e-6)


def test_greedy_decoding_continues_as_published(steps: Steps) -> None:
    steps.add(0, PROMPT)
    assert steps.generate(0, 8) == CONTINUATION


def test_the_residual_stream_after_each_layer_is_the_published_one(
    golden: Path, tmp_path: Path, picks: Picks | None
) -> None:
    runner = start(plan_for(golden, page_size=4), tmp_path, 0, lambda done, total: None, picks).runner
    assert isinstance(runner, Runner) and isinstance(runner.model, Step3p7Text)
    ids = torch.tensor(PROMPT, dtype=torch.int32).numpy().tobytes()
    pages = [PageUpdate(group, [0], [0], [6], list(range(1, 7))) for group in range(2)]
    plan = StepPlan(1, [0], [24], [True], [RowStart(0, ids, 0, 24, GREEDY)], pages)
    with torch.inference_mode():
        runner.rows.apply(plan)
        batch = runner.rows.begin(plan).batch
        blocks, streams = runner.model.blocks, []
        for count in range(len(blocks) + 1):
            runner.model.blocks = blocks[:count]
            streams.append(runner.model.forward(batch, runner.kv[:count])[-1, :4])
    assert torch.allclose(torch.stack(streams), torch.tensor(RESIDUALS), atol=ROUNDING)
