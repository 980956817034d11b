"""Weights as floating-point numbers of one dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from srt.layers.quant.contract import WEIGHT, Grid, StoredWeight, require_finite

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Plain:
    """One number for each number. Stored dtypes other than this one are converted while loading."""

    split_rows = 1
    split_columns = 1
    layer_wide: frozenset[str] = frozenset()

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.name = NAMES[dtype]

    def grids(self) -> Mapping[str, Grid]:
        return {WEIGHT: Grid(self.dtype, 1, 1)}

    def pack(self, weight: Tensor) -> StoredWeight:
        return StoredWeight(tuple(weight.shape), {WEIGHT: require_finite(weight).to(self.dtype)})

    def unpack(self, stored: StoredWeight) -> Tensor:
        return stored.weight.float()

    def matmul(self, x: Tensor, stored: StoredWeight) -> Tensor:
        return functional.linear(x, stored.weight.to(x.dtype))

    def matmul_coded(self, x: Tensor, stored: StoredWeight) -> Tensor:
        return self.matmul(x, stored)
