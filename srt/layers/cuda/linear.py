"""Plain weights on a GPU: Triton where a product has few rows and reads memory, cuBLAS where it computes.

Which is taken was measured on an H200 (docs/log.md) for the shapes of Step-3.7-Flash.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from srt.layers.cuda import linear_kernels as kernels
from srt.layers.cuda.arrivals import Counter
from srt.layers.cuda.launch import Launch
from srt.layers.gpu import Gpu
from srt.layers.linear import PackedLinear

NARROW: Final = (torch.bfloat16, torch.float16)


SLOTS: Final = 264
"""Programs of these products that run at the same time, two on each multiprocessor of an H200, up to 32 rows; with more
rows of x one has all of the memory, which is enough where there are few outputs."""
FEW: Final = 8
"""Rows up to which x is small beside the weights that a program reads."""
SOME: Final = 16
"""Rows up to which many outputs are cut into pieces of 64, beyond into pieces of 128."""
MOST: Final = 64
"""Rows up to which anything else than cuBLAS is worth while, and only for few outputs or very many."""
MANY_OUTPUTS: Final = 32768


class Tile(NamedTuple):
    """How a product is cut: outputs of a program, columns of a step, warps, steps under way, shares of K."""

    rows: int
    step: int
    warps: int
    stages: int = 1
    shares: int = 1


def tile_for(count: int, outputs: int, inputs: int) -> Tile | None:
    """The tile of a product [count, inputs] x [inputs, outputs]; None for cuBLAS."""
    if count == 1:
        if inputs < 2048:
            return Tile(4, 512, 2)
        return Tile(1, 2048, 2) if outputs <= 8192 <= inputs else Tile(4, 2048, 8)
    if inputs % 128 or count > MOST:
        return None
    programs = triton.cdiv(outputs, 64)
    if programs <= SLOTS // 4:
        return Tile(64, 128, 4, 4, _shares(inputs, 4 if count <= FEW else 2))
    if outputs >= MANY_OUTPUTS:
        return Tile(64, 128, 4, 4) if count <= SOME else Tile(128, 64, 8, 5)
    if count > FEW:
        return None
    # As many programs as there is room for at once: a few more would have all others wait.
    if programs <= SLOTS:
        return Tile(64, 128, 4, 4, _shares(inputs, 2 if 2 * programs <= SLOTS else 1))
    return Tile(128, 128, 8, 3)


def _shares(inputs: int, wanted: int) -> int:
    """Shares of K, each of which divides by 128."""
    while inputs % (128 * wanted):
        wanted //= 2
    return wanted


class TritonLinear:
    """`LinearFormat` for one GPU."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._launch = Launch(gpu)
        self._arrived = Counter(SLOTS)

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
            shares = tile.shares
            parts = torch.empty(shares, count, outputs, device=x.device) if shares > 1 else out
            kernels.rows_kernel[triton.cdiv(outputs, tile.rows), shares](
                x, x.stride(0), weight, out, parts, self._arrived.on(x.device), count, outputs, K=inputs,
                COUNT=max(8, triton.next_power_of_2(count)), ROWS=tile.rows, STEP=tile.step, SHARES=shares,
                STAGES=tile.stages, num_warps=tile.warps, **self._launch,
            )  # fmt: skip
        return out
