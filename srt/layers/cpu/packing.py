"""Weights in the layout of the matrix kernel: panels of 32 columns (see csrc/gemm.h and csrc/matrix.h)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from srt.layers.cpu.kernels import CODES, Kernels
from srt.layers.quant.contract import StoredWeight
from srt.layers.quant.fp8 import BLOCK, BLOCK_SCALE
from srt.layers.quant.nvfp4 import GROUP, GROUP_SCALE, MATRIX_SCALE

PANEL_HALF: Final = 16
"""Columns that share their outer scales; of a packed gate and up, gate columns beside as many up columns."""
PANEL: Final = 2 * PANEL_HALF
PLAIN: Final = 0
FP8: Final = 1
NVFP4: Final = 2
CODINGS: Final = {"fp8": FP8, "nvfp4": NVFP4, "nvfp4-a16": NVFP4}
"""The number that stands for a weight format in calls; plain numbers are 0."""


def pack_matrix(kernels: Kernels, weight: Tensor, order: Tensor | None = None) -> Tensor:
    """Pack [N, K], or its rows in `order` (int32, -1 for a row of zeros), into a flat tensor of the same dtype."""
    code, columns = CODES[weight.dtype], weight.shape[1]
    rows = weight.shape[0] if order is None else order.shape[0]
    packed = torch.empty(kernels.packed_words(code, rows, columns), dtype=torch.int32)
    pointer = None if order is None else order.data_ptr()
    kernels["srt_pack"](code, weight.data_ptr(), weight.stride(0), rows, columns, pointer, packed.data_ptr())
    return packed.view(weight.dtype)


def pack_coded(coding: int, stored: StoredWeight, order: Tensor) -> dict[str, Tensor]:
    """Pack a coded stack [E, N, K], its rows in `order` (-1 for a row of zeros): codes, `.groups`, `.scales`.

    One matrix at a time, so that beside the result little memory is taken. Each run of 16 rows of `order` lies in one
    block of 128 rows and in one part of the matrix scale: widths that a rank may have see to that.
    """
    experts, rows, columns = stored.shape
    index, real = order.clamp(min=0).long(), (order >= 0)[:, None]
    codes = stored.weight.view(torch.uint8)
    packed = {"": _stack(codes, index, real, 2 if coding == FP8 else 1)}
    starts = index[::PANEL_HALF]
    if coding == FP8:
        scales = stored.tensors[BLOCK_SCALE][:, starts // BLOCK]
    else:
        assert columns % GROUP == 0
        groups = stored.tensors[GROUP_SCALE].view(torch.uint8)
        packed[".groups"] = _stack(groups, index, real, 1)
        matrix = stored.tensors[MATRIX_SCALE]
        scales = matrix[:, starts // (rows // matrix.shape[1]), None]
    # [E, halves, blocks along K] -> [E, panels, blocks along K, 2]
    packed[".scales"] = scales.view(experts, -1, 2, scales.shape[-1]).transpose(2, 3).float().contiguous()
    return packed


def _stack(bytes_of: Tensor, index: Tensor, real: Tensor, together: int) -> Tensor:
    """Bytes [E, N, C], rows taken by `index`, zero where not `real` -> [E, P, ceil(C / together), 32, together]."""
    experts, _, columns = bytes_of.shape
    packed = bytes_of.new_empty(experts, len(index) // PANEL, -(-columns // together), PANEL, together)
    for one, place in zip(bytes_of, packed, strict=True):
        rows = functional.pad(one[index].mul_(real), (0, -columns % together))
        place.copy_(rows.view(-1, PANEL, place.shape[1], together).transpose(1, 2))
    return packed
