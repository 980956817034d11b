"""Root-mean-square normalisation with a zero-centred gain."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.layers.ops import Ops
from srt.layers.parameter import Parameter, Parameters


class Norm:
    """x / rms(x) * (1 + weight) over the last dimension; checkpoints store gamma - 1."""

    def __init__(self, ops: Ops, size: int, eps: float, dtype: torch.dtype) -> None:
        self._ops, self._eps = ops, eps
        self.weight = torch.empty(size, dtype=dtype)
        self._parameter = Parameter((size,), dtype, self._take)

    def _take(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self._ops.rms_norm(x, self.weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised sum, sum) of x and residual."""
        return self._ops.add_rms_norm(x, residual, self.weight, self._eps)

    def parameters(self) -> Parameters:
        """The gain, under `weight`."""
        return {"weight": self._parameter}
