"""Experts and their block against one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from srt.layers.moe.reference import ReferenceExperts
from srt.layers.ops import Choice, TorchOps
from srt.layers.quant.plain import Plain
from tests.support.experts import pack_plain


@pytest.mark.parametrize("limit", [None, 0.2])
def test_experts_sum_the_weighted_networks_of_each_token(limit: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(shape, generator=generator) for shape in ((5, 12, 8), (5, 8, 6)))
    hidden = torch.randn(7, 8, generator=generator)
    ids = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(7)]).int()
    choice = Choice(ids, torch.rand(7, 2, generator=generator))
    runner = ReferenceExperts(Plain(torch.float32))
    got = runner.run(hidden, choice, pack_plain(runner, gate_up, down, limit))
    for token in range(7):
        expected = torch.zeros(8)
        for expert, weight in zip(ids[token].tolist(), choice.weights[token], strict=True):
            inner = TorchOps().gated_silu(functional.linear(hidden[token : token + 1], gate_up[expert]), limit)
            expected += weight * functional.linear(inner, down[expert])[0]
        assert torch.allclose(got[token], expected, atol=1e-5)


def test_bfloat16_outputs_are_rounded_once_after_the_sum() -> None:
    runner = ReferenceExperts(Plain(torch.float32))
    down = torch.stack([torch.full((1, 1), 256.0), torch.full((1, 1), 1.0)]).bfloat16()
    experts = pack_plain(runner, torch.full((2, 2, 1), 10.0).bfloat16(), down)
    choice = Choice(torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[1.0, -256.0]]))
    assert runner.run(torch.ones(1, 1).bfloat16(), choice, experts).item() == 0.0
