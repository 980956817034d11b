"""Matrix products whose rows do not know of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.layers.cpu.kernels import CODES, Kernels
from srt.layers.cpu.packing import pack_matrix
from srt.layers.linear import PackedLinear


class CpuLinear:
    """`LinearFormat` for float32 and bfloat16: each output is summed along K in one order, whatever the batch."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._linear = kernels["srt_linear"]

    def pack(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(pack_matrix(self._kernels, weight.contiguous()), *weight.shape)

    def matmul(self, x: Tensor, packed: PackedLinear) -> Tensor:
        rows, size, dtype = x.shape[0], packed.out_features, x.dtype
        assert dtype is packed.data.dtype and x.stride(1) == 1
        out = torch.empty(rows, size, dtype=dtype)
        self._linear(
            CODES[dtype],
            x.data_ptr(),
            x.stride(0),
            packed.data.data_ptr(),
            out.data_ptr(),
            size,
            rows,
            size,
            packed.in_features,
        )
        return out
