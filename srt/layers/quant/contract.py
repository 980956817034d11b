"""What a weight format does: say what is stored, encode, decode, multiply.

A weight is a matrix [N, K] or a stack [E, N, K], y = x W^T. Formats store it as one main tensor, "weight", and scales
beside it. The formats here are plain torch, run anywhere and are the truth for every kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

WEIGHT = "weight"
"""Key of the main tensor among a weight's tensors."""


@dataclass(frozen=True)
class Grid:
    """One tensor of a stored weight: an entry for each block of `rows` x `columns` values of the matrix.

    `None` for both: one entry for the matrix, or one for each part where several matrices of equal height were
    stacked along their rows.
    """

    dtype: torch.dtype
    rows: int | None
    columns: int | None

    def shape(self, shape: tuple[int, ...], parts: int = 1) -> tuple[int, ...]:
        """Shape of this tensor for a weight [.., N, K]; blocks at the edges may be cut short."""
        if self.rows is None or self.columns is None:
            return (*shape[:-2], parts)
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // self.columns))


@dataclass(frozen=True)
class StoredWeight:
    """A weight [.., N, K] as tensors of its format, by the keys of `WeightFormat.grids`."""

    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @property
    def weight(self) -> Tensor:
        """The main tensor."""
        return self.tensors[WEIGHT]

    def __getitem__(self, index: int) -> StoredWeight:
        """One weight of a stack."""
        return StoredWeight(self.shape[1:], {key: tensor[index] for key, tensor in self.tensors.items()})


class WeightFormat(Protocol):
    """Bytes to numbers and back."""

    @property
    def name(self) -> str:
        """The word for it in options and tables."""
        ...

    @property
    def split_rows(self) -> int:
        """Output rows may be divided between ranks at multiples of this; a whole matrix may have any number."""
        ...

    @property
    def split_columns(self) -> int:
        """The same for input columns."""
        ...

    @property
    def layer_wide(self) -> frozenset[str]:
        """Tensors that say something of the activations, hence of all experts of a layer together."""
        ...

    def grids(self) -> Mapping[str, Grid]:
        """Every tensor that is stored for a weight, the main one first."""
        ...

    def pack(self, weight: Tensor) -> StoredWeight:
        """Encode [.., N, K] of any float dtype.

        Raises: ValueError if a value is not finite, or if a size does not fit the format.
        """
        ...

    def unpack(self, stored: StoredWeight) -> Tensor:
        """The numbers that the codes stand for, [.., N, K] float32."""
        ...

    def matmul(self, x: Tensor, stored: StoredWeight) -> Tensor:
        """x W^T with the activations as they are: [T, K] -> [T, N] in x's dtype, accumulated in float32."""
        ...

    def matmul_coded(self, x: Tensor, stored: StoredWeight) -> Tensor:
        """x W^T with the activations encoded too, as the hardware's product of two coded operands does it."""
        ...


def require_finite(weight: Tensor) -> Tensor:
    """The weight in float32. Raises: ValueError if it holds an infinity or a NaN."""
    wide = weight.float()
    if not bool(torch.isfinite(wide).all()):
        bad = int((~torch.isfinite(wide)).sum())
        raise ValueError(f"{bad} of {wide.numel()} values are not finite")
    return wide


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[T, K] x [N, K] -> [T, N] in x's dtype, with float32 operands and sums."""
    return (x.float() @ weight.float().T).to(x.dtype)
