from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from srt.layers.cpu.experts import CpuExperts
from srt.layers.cpu.kernels import Kernels
from srt.layers.ops import Choice
from srt.layers.quant.plain import Plain
from tests.layers.cpu.support import DTYPES, assert_close, gated, random
from tests.support.experts import pack_plain


def _choice(tokens: int, experts: int, top_k: int) -> Choice:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(torch.int32)
    return Choice(ids, torch.rand(tokens, top_k) + 0.1)


def _weights(experts: int, width: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = random(experts, 2 * width, hidden, dtype=dtype, scale=2 * hidden**-0.5)
    return gate_up, random(experts, hidden, width, dtype=dtype, scale=width**-0.5)


def _one(x: Tensor, gate_up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
    return gated(gate, up, limit) @ down.double().T


def _expected(x: Tensor, choice: Choice, gate_up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, weight in zip(choice.ids[token].tolist(), choice.weights[token].double(), strict=True):
            out[token] += weight * _one(x[token : token + 1], gate_up[expert], down[expert], limit)[0]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "hidden"),
    [(1, 8, 2, 16, 32), (1, 32, 4, 192, 64), (37, 8, 2, 24, 48), (70, 5, 3, 33, 70), (150, 4, 4, 17, 31)],
)
def test_experts_equal_the_sum_over_the_choice(
    kernels: Kernels,
    dtype: torch.dtype,
    limit: float | None,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    hidden: int,
) -> None:
    gate_up, down = _weights(experts, width, hidden, dtype)
    x, choice = random(tokens, hidden, dtype=dtype), _choice(tokens, experts, top_k)
    runner = CpuExperts(Plain(torch.float32), kernels)
    result = runner.run(x, choice, pack_plain(runner, gate_up, down, limit))
    assert_close(result, _expected(x, choice, gate_up, down, limit))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_width", [24, 8, 70])
def test_the_shared_expert_is_added_with_its_own_width_and_limit(
    kernels: Kernels, dtype: torch.dtype, shared_width: int
) -> None:
    gate_up, down = _weights(6, 24, 40, dtype)
    shared_gate_up, shared_down = _weights(1, shared_width, 40, dtype)
    x, choice = random(29, 40, dtype=dtype), _choice(29, 6, 2)
    runner = CpuExperts(Plain(torch.float32), kernels)
    packed, shared = pack_plain(runner, gate_up, down), pack_plain(runner, shared_gate_up, shared_down, 0.4)
    result = runner.run_with_shared(x, lambda: choice, packed, shared)
    expected = _expected(x, choice, gate_up, down, None) + _one(x, shared_gate_up[0], shared_down[0], 0.4)
    assert_close(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tokens_than_fit_one_round_are_all_there(kernels: Kernels, dtype: torch.dtype) -> None:
    gate_up, down = _weights(4, 16, 32, dtype)
    x, choice = random(5000, 32, dtype=dtype), _choice(5000, 4, 1)
    runner = CpuExperts(Plain(torch.float32), kernels)
    result = runner.run(x, choice, pack_plain(runner, gate_up, down))
    outputs = torch.stack([_one(x, gate_up[e], down[e], None) for e in range(4)])
    expected = outputs[choice.ids[:, 0].long(), torch.arange(5000)] * choice.weights.double()
    assert_close(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_equals_the_token_in_any_batch(kernels: Kernels, dtype: torch.dtype) -> None:
    gate_up, down = _weights(8, 48, 96, dtype)
    x, choice = random(137, 96, dtype=dtype), _choice(137, 8, 3)
    runner = CpuExperts(Plain(torch.float32), kernels)
    packed = pack_plain(runner, gate_up, down)
    shared = pack_plain(runner, *_weights(1, 48, 96, dtype))
    whole = runner.run_with_shared(x, lambda: choice, packed, shared)
    for size in (1, 2, 5, 37, 100):
        pieces = zip(*(torch.split(t, size) for t in (x, choice.ids, choice.weights)), strict=True)
        parts = [runner.run_with_shared(a, partial(Choice, b, c), packed, shared) for a, b, c in pieces]
        assert torch.equal(torch.cat(parts), whole), f"batches of {size}"


def test_all_tokens_may_choose_the_same_expert(kernels: Kernels) -> None:
    gate_up, down = _weights(8, 16, 32, torch.float32)
    x = random(60, 32)
    choice = Choice(torch.full((60, 1), 5, dtype=torch.int32), torch.ones(60, 1))
    runner = CpuExperts(Plain(torch.float32), kernels)
    assert_close(runner.run(x, choice, pack_plain(runner, gate_up, down, 7.0)), _one(x, gate_up[5], down[5], 7.0))


def test_a_view_with_strided_rows_is_read_right(kernels: Kernels) -> None:
    gate_up, down = _weights(4, 16, 31, torch.bfloat16)
    wide, choice = random(20, 64, dtype=torch.bfloat16), _choice(20, 4, 2)
    runner = CpuExperts(Plain(torch.float32), kernels)
    packed = pack_plain(runner, gate_up, down)
    view = wide[:, 3:34]
    assert torch.equal(runner.run(view, choice, packed), runner.run(view.clone(), choice, packed))
