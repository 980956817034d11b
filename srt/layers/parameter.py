"""Weights that are filled exactly once, piece by piece, and handed over when the last piece has come.

A matrix that a layer keeps merged (q, k, v and the head gate; gate and up) arrives as several tensors. Each is one
piece: the shape it has in the checkpoint, the slice of it that belongs to this rank, and where that slice goes.
Codes of a quantised weight keep their bytes: they must come in exactly the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOADABLE = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that convert into each other by a plain cast; a parameter of any other dtype takes only its own."""


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

    No cuts stand for the whole tensor and the whole parameter. A stack (the experts) may also come one by one:
    item i of dimension 0 then has the shape without that dimension. Trailing dimensions of 1 may be left out.
    """

    shape: tuple[int, ...]
    source: tuple[Cut, ...] = ()
    target: tuple[Cut, ...] = ()

    def stacked(self) -> Cut:
        """The items of dimension 0 that belong to this rank."""
        return next((cut for cut in self.source if cut.dim == 0), Cut(0, 0, self.shape[0] if self.shape else 1))


class Misfit(ValueError):
    """A tensor that does not belong in a parameter: wrong shape or dtype, or the piece was there already."""


class Parameter:
    """A tensor under construction. Memory is taken at the first piece and let go once `use` has the whole."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, use: Callable[[Tensor], None]) -> None:
        self.shape, self.dtype = shape, dtype
        self.pieces: dict[str, Piece] = {"": Piece(shape)}
        self._use = use
        self._arrived: dict[str, set[int | None]] = {}
        self._tensor: Tensor | None = None

    @classmethod
    def merged(
        cls, shape: tuple[int, ...], dtype: torch.dtype, pieces: Mapping[str, Piece], use: Callable[[Tensor], None]
    ) -> Parameter:
        """A parameter of several pieces without overlap; what they leave uncovered is zero."""
        parameter = cls(shape, dtype, use)
        parameter.pieces = dict(pieces)
        return parameter

    def misfit(self, name: str, item: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """What is wrong with a tensor of this shape and dtype for a piece, or for one item of it; None if it fits."""
        whole = self.pieces[name].shape
        expected = whole if item is None else whole[1:]
        if item is not None and not (whole and 0 <= item < whole[0]):
            return f"is number {item}, there are {whole[0] if whole else 0}"
        if _trimmed(shape) != _trimmed(expected):
            return f"has shape {list(shape)}, expected {list(expected)}"
        allowed = LOADABLE if self.dtype in LOADABLE else (self.dtype,)
        if dtype not in allowed:
            return f"has dtype {dtype}, expected {'one of ' * (len(allowed) > 1)}{', '.join(map(str, allowed))}"
        return None

    def missing(self, name: str) -> list[int] | None:
        """Items of a piece's stack that have not come; None if nothing of the piece has, [] if all of it."""
        arrived = self._arrived.get(name)
        if not arrived:
            return None
        return [] if None in arrived else [item for item in range(self.pieces[name].shape[0]) if item not in arrived]

    def fill(self, name: str, tensor: Tensor, item: int | None = None) -> None:
        """Put a piece, or one item of its stack, in its place; with the last one the parameter is handed over.

        Raises: Misfit that says what is wrong with the tensor.
        """
        wrong = self.misfit(name, item, tuple(tensor.shape), tensor.dtype)
        arrived = self._arrived.setdefault(name, set())
        if wrong or item in arrived or None in arrived or (item is None and arrived):
            raise Misfit(wrong or "is there twice")
        if self._tensor is None:
            self._tensor = torch.zeros(self.shape, dtype=self.dtype)
        self._place(self.pieces[name], tensor, item)
        arrived.add(item)
        if all(self.missing(piece) == [] for piece in self.pieces):
            self._use(self._tensor)
            self._tensor = None

    def _place(self, piece: Piece, tensor: Tensor, item: int | None) -> None:
        """Copy this rank's slice of a piece, or of one item of it."""
        assert self._tensor is not None
        target = self._tensor
        for cut in piece.target:
            target = cut.of(target)
        if item is None:
            source = tensor.reshape(piece.shape)
            for cut in piece.source:
                source = cut.of(source)
            target.copy_(source)
            return
        mine = piece.stacked()
        if not mine.start <= item < mine.start + mine.length:
            return
        source = tensor.reshape(piece.shape[1:])
        for cut in piece.source:
            if cut.dim > 0:
                source = Cut(cut.dim - 1, cut.start, cut.length).of(source)
        target[item - mine.start].copy_(source)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without trailing ones: a scale of one number is stored as [] or [1], of E numbers as [E] or [E, 1]."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


Parameters = dict[str, Parameter]
"""Parameters of a layer or model by dotted name."""


def nested(prefix: str, parameters: Parameters) -> Parameters:
    """The same parameters under `prefix.`."""
    return {f"{prefix}.{name}": parameter for name, parameter in parameters.items()}
