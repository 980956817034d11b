"""Products with few rows in Triton against plain torch: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from srt.layers.cuda.linear import TritonLinear, tile_for
from srt.layers.gpu import current_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 70, 512), (1, 40, 4096), (5, 40, 512), (16, 8200, 256), (33, 64, 8192), (65, 32, 512), (0, 32, 512)]


@pytest.mark.parametrize(("count", "outputs", "inputs"), SHAPES)
def test_products_equal_plain_torch(count: int, outputs: int, inputs: int) -> None:
    linear = TritonLinear(current_gpu())
    x = torch.randn(count, inputs + 8, device=DEVICE).bfloat16()[:, :inputs]
    weight = (torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5).bfloat16()
    found = linear.matmul(x, linear.pack(weight))
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=1e-2)


def test_each_kind_of_tile_is_tried_above() -> None:
    tiles = [tile_for(*shape) for shape in SHAPES if shape[0]]
    assert len(set(tiles)) == len(tiles)
    assert tile_for(8, 64, 100) is None
