"""Norms, activation, routing and arg max in Triton against plain torch: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srt.layers.cuda.ops import TritonOps
from srt.layers.ops import TorchOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
"""Relative: sums in another order, or one rounding to 8 bits more or less."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 72), (5, 1024)])
def test_norms_equal_plain_torch(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual, weight = random(rows, 2 * size, dtype=dtype)[:, :size], random(rows, size, dtype=dtype), random(size)
    weight = weight.to(dtype)
    close(TritonOps().rms_norm(x, weight, 1e-5), TorchOps().rms_norm(x, weight, 1e-5))
    normed, total = TritonOps().add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = TorchOps().add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    close(normed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.7])
def test_the_activation_equals_plain_torch(dtype: torch.dtype, limit: float | None) -> None:
    gate_up = random(3, 3000, dtype=dtype)[:, : 2 * 1100]
    close(TritonOps().gated_silu(gate_up, limit), TorchOps().gated_silu(gate_up, limit))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 67])
def test_routing_chooses_the_experts_that_plain_torch_chooses(dtype: torch.dtype, tokens: int) -> None:
    size, experts = 200, 37
    x, weight, bias = random(tokens, size, dtype=dtype), random(experts, size) * 0.1, random(experts)
    ops = TritonOps()
    found = ops.route(x, ops.pack_router(weight), bias, top_k=6, factor=3.0)
    expected = TorchOps().route(x, weight, bias, top_k=6, factor=3.0)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.weights, expected.weights, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tokens", [1, 4])
def test_routing_for_few_tokens_leaves_nothing_behind_for_the_next_ones(tokens: int) -> None:
    ops = TritonOps()
    weight, bias = random(40, 200) * 0.1, random(40)
    for x in random(3, tokens, 200):
        found, expected = (one.route(x, weight, bias, top_k=6, factor=3.0) for one in (ops, TorchOps()))
        assert torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_are_chosen_by_scores_of_either_sign_and_weighed_by_their_own(tokens: int) -> None:
    weight, bias = random(70, 64) * 0.1, torch.linspace(-4, 0.5, 70, device=DEVICE)
    x = random(tokens, 64)
    found, expected = (one.route(x, weight, bias, top_k=40, factor=3.0) for one in (TritonOps(), TorchOps()))
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.weights, expected.weights, atol=2e-5, rtol=2e-5)


def test_of_equal_scores_the_lowest_expert_is_chosen_first() -> None:
    ops = TritonOps()
    choice = ops.route(
        random(2, 64), torch.zeros(8, 64, device=DEVICE), torch.zeros(8, device=DEVICE), top_k=3, factor=1.0
    )
    assert choice.ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(choice.weights, torch.full_like(choice.weights, 1 / 3))


@pytest.mark.parametrize("size", [5, 4096, 9001])
def test_the_largest_logit_wins_and_the_lowest_id_among_equals(size: int) -> None:
    logits = random(4, size + 8, dtype=torch.bfloat16)[:, :size]
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert TritonOps().sample_greedy(logits).tolist() == expected
    flat = torch.zeros(2, size, device=DEVICE)
    assert TritonOps().sample_greedy(flat).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_with_a_logit_that_is_not_finite_are_told(bad: float) -> None:
    logits = random(3, 5000)
    logits[1, 4500] = bad
    for ops in (TritonOps(), TorchOps()):
        tokens, finite = ops.largest(logits)
        assert finite.tolist() == [1, 0, 1]
        assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=-1).tolist()


def test_empty_batches_are_empty() -> None:
    ops = TritonOps()
    assert ops.rms_norm(random(0, 64), random(64), 1e-5).shape == (0, 64)
    assert ops.gated_silu(random(0, 64), None).shape == (0, 32)
    assert ops.route(random(0, 64), random(8, 64), random(8), top_k=3, factor=1.0).ids.shape == (0, 3)
    assert ops.sample_greedy(random(0, 64)).shape == (0,)
