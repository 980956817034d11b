from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from srt.layers.cpu.kernels import Kernels
from srt.layers.cpu.ops import CpuOps
from srt.layers.ops import Choice
from tests.layers.cpu.support import DTYPES, assert_close, gated, random

EPS = 1e-5
SIZES = [(1, 1), (3, 64), (2, 77), (37, 512), (1, 33), (130, 96)]


@pytest.fixture
def ops(kernels: Kernels) -> CpuOps:
    return CpuOps(kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_a_norm_equals_its_formula(ops: CpuOps, dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = random(rows, size + 5, dtype=dtype)[:, :size], random(size, dtype=dtype, scale=0.3)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (1 + weight.double())
    assert_close(ops.rms_norm(x, weight, EPS), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_add_and_norm_round_the_sum_before_they_normalise(
    ops: CpuOps, dtype: torch.dtype, rows: int, size: int
) -> None:
    x, residual, weight = random(rows, size, dtype=dtype), random(rows, size, dtype=dtype), random(size, dtype=dtype)
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(x + residual, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 7.0, 0.3])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (37, 192), (300, 64)])
def test_the_activation_clamps_the_gate_after_silu(
    ops: CpuOps, dtype: torch.dtype, limit: float | None, rows: int, width: int
) -> None:
    x = random(rows, 2 * width, dtype=dtype, scale=4.0)
    expected = gated(x[:, :width].double(), x[:, width:].double(), limit)
    assert_close(ops.gated_silu(x, limit), expected, 1e-5 if dtype is torch.float32 else 4e-3)


def test_the_activation_of_extreme_gates_is_finite_and_nan_stays_nan(ops: CpuOps) -> None:
    gates = torch.tensor([-1e30, -200.0, -88.0, -0.0, 88.0, 200.0, math.nan])
    result = ops.gated_silu(torch.cat([gates, torch.ones(7)])[None], None)[0]
    assert torch.allclose(result[:6], torch.tensor([0.0, 0.0, 0.0, 0.0, 88.0, 200.0]), atol=1e-30, rtol=1e-6)
    assert result[6].isnan()


def _choose(ops: CpuOps, logits: Tensor, bias: Tensor, top_k: int, factor: float) -> Choice:
    """Route by given logits: the product with the identity leaves them as they are."""
    return ops.route(logits, ops.pack_router(torch.eye(logits.shape[1])), bias, top_k=top_k, factor=factor)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (37, 32, 4), (5, 33, 5), (3, 288, 8)])
def test_experts_are_chosen_by_biased_and_weighed_by_unbiased_score(
    ops: CpuOps, tokens: int, experts: int, top_k: int
) -> None:
    logits, bias = random(tokens, experts), random(experts, scale=0.5)
    choice = _choose(ops, logits, bias, top_k, 3.0)
    scores = logits.double().sigmoid()
    ids = (scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(-1, ids)
    assert choice.ids.dtype is torch.int32
    assert torch.equal(choice.ids.long(), ids)
    assert_close(choice.weights, 3.0 * chosen / chosen.sum(-1, keepdim=True))


def test_among_equal_scores_the_lower_expert_comes_first(ops: CpuOps) -> None:
    choice = _choose(ops, torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]]), torch.zeros(5), 4, 1.0)
    assert choice.ids.tolist() == [[1, 2, 4, 0]]


def test_scores_that_underflow_leave_weights_finite(ops: CpuOps) -> None:
    assert _choose(ops, torch.full((1, 8), -300.0), torch.zeros(8), 2, 3.0).weights.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "experts"), [(1, 512, 32), (37, 128, 8), (13, 77, 33), (100, 64, 288)])
def test_routing_multiplies_in_float32_whatever_the_dtype(
    ops: CpuOps, dtype: torch.dtype, tokens: int, hidden: int, experts: int
) -> None:
    x, weight, bias = random(tokens, hidden, dtype=dtype), random(experts, hidden, scale=0.05), random(experts)
    choice = ops.route(x, ops.pack_router(weight), bias, top_k=4, factor=3.0)
    scores = (x.double() @ weight.double().T).sigmoid()
    ids = (scores + bias).topk(4, dim=-1).indices
    chosen = scores.gather(-1, ids)
    assert torch.equal(choice.ids.long(), ids)
    assert_close(choice.weights, 3.0 * chosen / chosen.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_routed_alike_alone_and_in_a_batch(ops: CpuOps, dtype: torch.dtype) -> None:
    x, weight, bias = random(137, 96, dtype=dtype), random(32, 96), random(32)
    packed = ops.pack_router(weight)
    whole = ops.route(x, packed, bias, top_k=4, factor=3.0)
    for at in range(0, 137, 17):
        alone = ops.route(x[at : at + 1], packed, bias, top_k=4, factor=3.0)
        assert torch.equal(alone.ids[0], whole.ids[at])
        assert torch.equal(alone.weights[0], whole.weights[at])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 8192])
def test_the_first_of_the_largest_logits_is_taken(ops: CpuOps, dtype: torch.dtype, size: int) -> None:
    logits = random(19, size, dtype=dtype)
    assert torch.equal(ops.sample_greedy(logits), logits.argmax(-1))
    ties = torch.zeros(3, size, dtype=dtype)
    ties[1, size // 2 :] = 2.0
    ties[2] = -math.inf
    assert ops.sample_greedy(ties).tolist() == [0, size // 2, 0]
    ties[0, size - 1] = math.nan
    ties[1, 0] = math.inf
    assert ops.sample_greedy(ties).tolist() == [size - 1, 0, 0]
