"""Weights in the layout of the matrix kernel: panels of 32 columns (see csrc/gemm.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.layers.cpu.kernels import CODES, Kernels


def pack_matrix(kernels: Kernels, weight: Tensor, order: Tensor | None = None) -> Tensor:
    """Pack [N, K], or its rows in `order` (int32, -1 for a row of zeros), into a flat tensor of the same dtype."""
    code, columns = CODES[weight.dtype], weight.shape[1]
    rows = weight.shape[0] if order is None else order.shape[0]
    packed = torch.empty(kernels.packed_words(code, rows, columns), dtype=torch.int32)
    pointer = None if order is None else order.data_ptr()
    kernels["srt_pack"](code, weight.data_ptr(), weight.stride(0), rows, columns, pointer, packed.data_ptr())
    return packed.view(weight.dtype)
