"""The plain operations against their definitions, with values where a wrong rule shows."""

from __future__ import annotations

import pytest
import torch

from srt.layers.ops import TorchOps

OPS = TorchOps()


def test_a_weight_of_zero_normalises_plainly() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(OPS.rms_norm(x, torch.zeros(2), 0.0), x / 12.5**0.5)


def test_the_gain_is_applied_before_the_one_rounding() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.full((128,), 0.37).bfloat16()
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight.double())
    assert torch.equal(OPS.rms_norm(x, weight, 1e-5), exact.float().bfloat16())


def test_adding_and_normalising_returns_the_sum_too() -> None:
    x, residual, weight = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    normed, total = OPS.add_rms_norm(x, residual, weight[0], 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, OPS.rms_norm(x + residual, weight[0], 1e-5))


@pytest.mark.parametrize(
    ("gate", "up", "limit", "expected"),
    [
        (2.0, 3.0, None, 2 * torch.tensor(2.0).sigmoid() * 3),
        (9.0, 3.0, 0.3, 0.3 * 0.3),
        (9.0, -3.0, 0.3, 0.3 * -0.3),
        (-9.0, 0.2, 0.3, -9 * torch.tensor(-9.0).sigmoid() * 0.2),
        (0.35, 0.1, 0.3, 0.35 * torch.tensor(0.35).sigmoid() * 0.1),
    ],
)
def test_the_gate_is_clamped_after_silu_and_above_only_the_other_on_both_sides(
    gate: float, up: float, limit: float | None, expected: float
) -> None:
    assert OPS.gated_silu(torch.tensor([[gate, up]]), limit).item() == pytest.approx(float(expected), rel=1e-6)


def test_experts_are_chosen_with_the_bias_and_weighed_without_it() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    choice = OPS.choose_experts(logits, torch.tensor([0.0, -9.0, 0.0, 9.0]), top_k=2, factor=3.0)
    assert choice.ids.tolist() == [[3, 0]]
    assert choice.ids.dtype == torch.int32
    scores = logits.sigmoid()[0]
    expected = 3.0 * torch.stack([scores[3], scores[0]]) / (scores[3] + scores[0])
    assert torch.allclose(choice.weights[0], expected)


def test_weights_stay_finite_when_every_score_underflows() -> None:
    choice = OPS.choose_experts(torch.full((1, 4), -200.0), torch.zeros(4), top_k=2, factor=3.0)
    assert choice.weights.tolist() == [[0.0, 0.0]]
