"""Merged and split matrices: pieces arrive in any order, ranks together have the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srt.distributed import TensorGroup
from srt.layers.embedding import Head
from srt.layers.linear import Linear, LinearFormat, OneDnnLinear, PlainLinear, column_linear, row_linear
from srt.layers.parameter import Misfit


class Rank(TensorGroup):
    """One of `size` ranks, alone: it splits like the real one and exchanges nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def filled(linear: Linear, pieces: dict[str, Tensor]) -> Linear:
    for name, tensor in pieces.items():
        linear.weight.fill(name, tensor)
    return linear


def weights(**outputs: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, 6, generator=generator) for name, count in outputs.items()}


def test_ranks_of_a_merged_column_linear_share_each_piece_evenly() -> None:
    pieces = weights(v=2, q=4)
    x = torch.randn(3, 6)
    for rank in range(2):
        linear = filled(column_linear(PlainLinear(), Rank(rank, 2), torch.float32, 6, {"q": 4, "v": 2}), pieces)
        q, v = pieces["q"][2 * rank : 2 * rank + 2], pieces["v"][rank : rank + 1]
        assert torch.allclose(linear(x), x @ torch.cat([q, v]).T)


def test_products_of_row_linear_ranks_sum_to_the_whole() -> None:
    (whole,) = weights(o=4).values()
    x = torch.randn(3, 6)
    parts = [filled(row_linear(PlainLinear(), Rank(r, 3), torch.float32, 6, 4), {"": whole}) for r in range(3)]
    total = sum(linear(x[:, 2 * rank : 2 * rank + 2]) for rank, linear in enumerate(parts))
    assert torch.allclose(torch.as_tensor(total), x @ whole.T, atol=1e-6)


def test_a_count_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="5 does not divide by the tensor-parallel size 2"):
        column_linear(PlainLinear(), Rank(0, 2), torch.float32, 6, {"q": 5})


def test_ranks_of_a_head_cover_a_vocabulary_that_does_not_divide() -> None:
    (whole,) = weights(head=7).values()
    x = torch.randn(2, 6)
    logits = []
    for rank in range(3):
        head = Head(PlainLinear(), Rank(rank, 3), torch.float32, 7, 6)
        head.parameters()["weight"].fill("", whole)
        logits.append(head(x))
    assert torch.allclose(torch.cat(logits, dim=-1)[:, :7], x @ whole.T, atol=1e-6)


def test_a_piece_that_comes_twice_or_in_another_shape_is_refused() -> None:
    linear = column_linear(PlainLinear(), TensorGroup(), torch.float32, 6, {"q": 4, "v": 2})
    linear.weight.fill("q", torch.zeros(4, 6))
    with pytest.raises(Misfit, match="is there twice"):
        linear.weight.fill("q", torch.zeros(4, 6))
    with pytest.raises(Misfit, match=r"has shape \[4, 6\], expected \[2, 6\]"):
        linear.weight.fill("v", torch.zeros(4, 6))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_reordered_weights_multiply_like_plain_ones(tokens: int) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 arithmetic in oneDNN")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 64, generator=generator).bfloat16()
    weight = torch.randn(96, 64, generator=generator).bfloat16()

    def product(weight_format: LinearFormat) -> Tensor:
        return weight_format.matmul(x, weight_format.pack(weight)).float()

    assert torch.allclose(product(OneDnnLinear()), product(PlainLinear()), rtol=2**-7, atol=2**-5)
