"""Weights that are filled exactly once, piece by piece, and handed over when the last piece has come.

A matrix that a layer keeps merged (q, k, v and the head gate; gate and up) arrives as several tensors. Each is one
piece: the shape it has in the checkpoint, the slice of it that belongs to this rank, and where that slice goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOADABLE = (torch.bfloat16, torch.float16, torch.float32)
"""Stored dtypes that convert to a parameter's own by a plain cast."""


@dataclass(frozen=True)
class Cut:
    """A slice `[start, start + length)` of dimension `dim`."""

    dim: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of `tensor`, as a view."""
        return tensor.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint: its whole shape there, this rank's slice of it, its place in the parameter.

    `None` stands for the whole tensor and the whole parameter.
    """

    shape: tuple[int, ...]
    source: Cut | None = None
    target: Cut | None = None


class Misfit(ValueError):
    """A tensor that does not belong in a parameter: wrong shape or dtype, or the piece was there already."""


class Parameter:
    """A tensor under construction. Memory is taken at the first piece and let go once `use` has the whole."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, use: Callable[[Tensor], None]) -> None:
        self.shape, self.dtype = shape, dtype
        self.pieces: dict[str, Piece] = {"": Piece(shape)}
        self._use = use
        self._filled: set[str] = set()
        self._tensor: Tensor | None = None

    @classmethod
    def merged(
        cls, shape: tuple[int, ...], dtype: torch.dtype, pieces: Mapping[str, Piece], use: Callable[[Tensor], None]
    ) -> Parameter:
        """A parameter of several pieces, which must cover it without overlap."""
        parameter = cls(shape, dtype, use)
        parameter.pieces = dict(pieces)
        return parameter

    def fill(self, name: str, tensor: Tensor) -> None:
        """Put a piece in its place; with the last one the parameter is handed over.

        Raises: Misfit that says what is wrong with the tensor.
        """
        piece = self.pieces[name]
        if name in self._filled:
            raise Misfit("is there twice")
        if tuple(tensor.shape) != piece.shape:
            raise Misfit(f"has shape {list(tensor.shape)}, expected {list(piece.shape)}")
        if tensor.dtype not in LOADABLE:
            raise Misfit(f"has dtype {tensor.dtype}, expected one of {', '.join(map(str, LOADABLE))}")
        if self._tensor is None:
            self._tensor = torch.zeros(self.shape, dtype=self.dtype)
        source = tensor if piece.source is None else piece.source.of(tensor)
        target = self._tensor if piece.target is None else piece.target.of(self._tensor)
        target.copy_(source)
        self._filled.add(name)
        if len(self._filled) == len(self.pieces):
            self._use(self._tensor)
            self._tensor = None


Parameters = dict[str, Parameter]
"""Parameters of a layer or model by dotted name."""


def nested(prefix: str, parameters: Parameters) -> Parameters:
    """The same parameters under `prefix.`."""
    return {f"{prefix}.{name}": parameter for name, parameter in parameters.items()}
