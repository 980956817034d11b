"""Matrix products over packed weights: whole, split by output (column) or by input (row) over the ranks.

A `LinearFormat` says how a weight is laid out and multiplied. Weights are packed once, while they load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from srt.distributed import TensorGroup
from srt.layers.parameter import Cut, Parameter, Parameters, Piece


@dataclass(frozen=True)
class PackedLinear:
    """A weight [N, K] in the layout of the format that packed it."""

    data: Tensor
    out_features: int
    in_features: int


class LinearFormat(Protocol):
    """How a weight is stored and multiplied."""

    def pack(self, weight: Tensor) -> PackedLinear:
        """Lay out a weight [N, K]; the caller lets go of it afterwards."""
        ...

    def matmul(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """x @ weight.T: [T, K] -> [T, N] in x's dtype, accumulated in float32."""
        ...


class PlainLinear:
    """The weight as it is: the reference, for every device and dtype."""

    def pack(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(weight, *weight.shape)

    def matmul(self, x: Tensor, packed: PackedLinear) -> Tensor:
        return functional.linear(x, packed.data)


class OneDnnLinear:
    """bfloat16 on a CPU with the weight reordered into oneDNN's blocks: about twice as fast for few tokens."""

    def pack(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight, None), *weight.shape)

    def matmul(self, x: Tensor, packed: PackedLinear) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.data, None, "none", [], "")
        return product


class Linear:
    """y = x W^T without bias, its weight one packed matrix on this rank."""

    def __init__(
        self, weight_format: LinearFormat, shape: tuple[int, int], dtype: torch.dtype, pieces: Mapping[str, Piece]
    ) -> None:
        self._format = weight_format
        self._packed: PackedLinear
        self.weight = Parameter.merged(shape, dtype, pieces, self._pack)

    def _pack(self, weight: Tensor) -> None:
        self._packed = self._format.pack(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return self._format.matmul(x, self._packed)

    def parameters(self) -> Parameters:
        """The one parameter, under `weight`."""
        return {"weight": self.weight}


def column_linear(
    weight_format: LinearFormat, group: TensorGroup, dtype: torch.dtype, in_features: int, outputs: Mapping[str, int]
) -> Linear:
    """Matrices `name: out_features` stacked into one product; each rank has an equal share of each one's outputs.

    Raises: ValueError if a count of outputs does not divide by the group's size.
    """
    pieces: dict[str, Piece] = {}
    start = 0
    for name, out_features in outputs.items():
        share = group.share(out_features)
        pieces[name] = Piece((out_features, in_features), (Cut(0, group.rank * share, share),), (Cut(0, start, share),))
        start += share
    return Linear(weight_format, (start, in_features), dtype, pieces)


def row_linear(
    weight_format: LinearFormat, group: TensorGroup, dtype: torch.dtype, in_features: int, out_features: int
) -> Linear:
    """One matrix, split by its inputs: the ranks' products must be summed by the caller.

    Raises: ValueError if the inputs do not divide by the group's size.
    """
    share = group.share(in_features)
    piece = Piece((out_features, in_features), (Cut(1, group.rank * share, share),))
    return Linear(weight_format, (out_features, share), dtype, {"": piece})
