from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srt.layers.cpu.kernels import Kernels
from srt.layers.cpu.linear import CpuLinear
from tests.layers.cpu.support import DTYPES, assert_close, random

# (rows, out, in): tiles, panels and words cut short in every way.
SHAPES = [(1, 1, 2), (1, 64, 64), (2, 33, 7), (5, 31, 129), (12, 32, 192), (13, 100, 96), (37, 70, 193), (200, 96, 65)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
def test_a_product_equals_the_plain_one(
    kernels: Kernels, dtype: torch.dtype, rows: int, outputs: int, inputs: int
) -> None:
    weight, x = random(outputs, inputs, dtype=dtype), random(rows, inputs, dtype=dtype)
    linear = CpuLinear(kernels)
    product = linear.matmul(x, linear.pack(weight))
    assert product.dtype is dtype
    assert_close(product, x.double() @ weight.double().T, 1e-5 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_a_strided_view(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, wide = random(48, 40, dtype=dtype), random(9, 77, dtype=dtype)
    linear = CpuLinear(kernels)
    packed = linear.pack(weight)
    for start in (0, 1, 37):
        x = wide[:, start : start + 40]
        assert torch.equal(linear.matmul(x, packed), linear.matmul(x.clone(), packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_equals_the_row_in_any_batch(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, x = random(200, 257, dtype=dtype), random(400, 257, dtype=dtype)
    linear = CpuLinear(kernels)
    packed = linear.pack(weight)
    whole = linear.matmul(x, packed)
    for rows in (*range(1, 14), 37, 193):
        parts = torch.cat([linear.matmul(part, packed) for part in torch.split(x, rows)])
        assert torch.equal(parts, whole), f"batches of {rows}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, x = random(640, 512, dtype=dtype), random(37, 512, dtype=dtype)
    linear = CpuLinear(kernels)
    packed = linear.pack(weight)
    results: list[Tensor] = []
    for threads in (1, 2, 3):
        kernels["srt_set_threads"](threads)
        results.append(linear.matmul(x, packed))
    kernels["srt_set_threads"](2)
    assert all(torch.equal(results[0], result) for result in results)


def test_no_rows_give_no_rows(kernels: Kernels) -> None:
    linear = CpuLinear(kernels)
    assert linear.matmul(torch.empty(0, 8), linear.pack(random(4, 8))).shape == (0, 4)


def test_a_weight_that_is_a_transposed_view_is_packed_as_it_reads(kernels: Kernels) -> None:
    weight, x = random(24, 40).T, random(3, 24)
    linear = CpuLinear(kernels)
    assert_close(linear.matmul(x, linear.pack(weight)), x.double() @ weight.double().T)
