"""Plain weights on a GPU: Triton where a product has few rows and reads memory, cuBLAS where it computes.

Which is taken was measured on an H200 (docs/benchmarks.md) for the shapes of Step-3.7-Flash.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from srt.layers.cuda import linear_kernels as kernels
from srt.layers.cuda.launch import Launch
from srt.layers.gpu import Gpu
from srt.layers.linear import PackedLinear

NARROW: Final = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """How a product is cut: outputs of a program, columns of a step, warps, steps under way."""

    rows: int
    step: int
    warps: int
    stages: int = 1


def tile_for(count: int, outputs: int, inputs: int) -> Tile | None:
    """The tile of a product [count, inputs] x [inputs, outputs]; None for cuBLAS."""
    if count == 1:
        if inputs < 2048:
            return Tile(4, 512, 2)
        return Tile(1, 2048, 2) if outputs <= 8192 <= inputs else Tile(4, 2048, 8)
    if inputs % 256:
        return None
    if count <= 16:
        if outputs >= 8192:
            return Tile(64, 128, 4, 4)
        return Tile(32, 256, 4, 4) if inputs >= 8192 else Tile(32, 128, 4, 5)
    return Tile(32, 128, 4, 8) if count <= 64 and outputs <= 4096 and inputs >= 8192 else None


class TritonLinear:
    """`LinearFormat` for one GPU."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._launch = Launch(gpu)

    def pack(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(weight.contiguous(), *weight.shape)

    def matmul(self, x: Tensor, packed: PackedLinear) -> Tensor:
        return self.product(x, packed.data)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, K] by [N, K] -> [T, N]."""
        (count, inputs), outputs = x.shape, weight.shape[0]
        tile = tile_for(count, outputs, inputs) if count and x.dtype in NARROW and x.stride(1) == 1 else None
        if tile is None:
            return functional.linear(x, weight)
        out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
        if count == 1:
            kernels.vector_kernel[triton.cdiv(outputs, tile.rows),](
                x, weight, out, outputs, K=inputs, ROWS=tile.rows, STEP=tile.step,
                num_warps=tile.warps, **self._launch,
            )  # fmt: skip
        else:
            kernels.rows_kernel[triton.cdiv(outputs, tile.rows),](
                x, x.stride(0), weight, out, count, outputs, K=inputs,
                COUNT=max(16, triton.next_power_of_2(count)), ROWS=tile.rows, STEP=tile.step, STAGES=tile.stages,
                num_warps=tile.warps, **self._launch,
            )  # fmt: skip
        return out
