"""Products with few rows in Triton against plain torch: in the interpreter, or on a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from srt.layers.cuda.linear import TritonLinear, tile_for
from srt.layers.gpu import current_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (1, 70, 512), (1, 40, 4096), (1, 40, 8192), (0, 32, 512), (5, 40, 1024), (5, 40, 384), (16, 70, 768),
    (3, 4300, 256), (8, 8500, 128), (2, 17000, 128), (9, 32800, 128), (33, 32800, 128), (65, 32, 512),
]  # fmt: skip


@pytest.mark.parametrize(("count", "outputs", "inputs"), SHAPES)
def test_products_equal_plain_torch(count: int, outputs: int, inputs: int) -> None:
    linear = TritonLinear(current_gpu())
    x = torch.randn(count, inputs + 8, device=DEVICE).bfloat16()[:, :inputs]
    weight = (torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5).bfloat16()
    found = linear.matmul(x, linear.pack(weight))
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=1e-2)


def test_each_kind_of_tile_is_tried_above() -> None:
    tried = {tile_for(*shape) for shape in SHAPES if shape[0]}
    counts, outputs = (1, 2, 8, 9, 16, 17, 64, 65), (8, 4096, 8192, 14432, 22528, 64448, 128896)
    assert tried >= {tile_for(*shape) for shape in product(counts, outputs, (128, 256, 384, 1024, 4096, 12288))}
    assert tile_for(8, 64, 100) is None


def test_programs_count_themselves_anew_in_each_product() -> None:
    linear = TritonLinear(current_gpu())
    weight = torch.randn(200, 512, device=DEVICE).bfloat16()
    for rows in (5, 3, 5, 12):
        x = torch.randn(rows, 512, device=DEVICE).bfloat16()
        torch.testing.assert_close(linear.product(x, weight), x @ weight.T, atol=0.3, rtol=1e-2)
