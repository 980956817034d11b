"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from srt.distributed import TensorGroup
from srt.layers.linear import Linear, LinearFormat
from srt.layers.parameter import Cut, Parameter, Parameters, Piece


class Embedding:
    """Rows of a table. Every rank has the whole table: a lookup then needs no collective."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        self._table: Tensor
        self._parameter = Parameter((vocab_size, hidden_size), dtype, self._take)

    def _take(self, table: Tensor) -> None:
        self._table = table

    def __call__(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H]."""
        return functional.embedding(ids, self._table)

    def parameters(self) -> Parameters:
        """The table, under `weight`."""
        return {"weight": self._parameter}


class Head:
    """The output matrix, split by vocabulary; every rank gets all logits.

    The last rank's part is padded with zero rows when the vocabulary does not divide evenly.
    """

    def __init__(
        self, weight_format: LinearFormat, group: TensorGroup, dtype: torch.dtype, vocab_size: int, hidden_size: int
    ) -> None:
        self._group, self._vocab_size = group, vocab_size
        share = -(-vocab_size // group.size)
        start = min(group.rank * share, vocab_size)
        length = min(share, vocab_size - start)
        piece = Piece((vocab_size, hidden_size), (Cut(0, start, length),), (Cut(0, 0, length),))
        self._linear = Linear(weight_format, (share, hidden_size), dtype, {"": piece})

    def __call__(self, hidden: Tensor) -> Tensor:
        """[L, H] -> [L, V]."""
        logits = self._group.all_gather(self._linear(hidden))
        return logits[:, : self._vocab_size] if logits.shape[-1] > self._vocab_size else logits

    def parameters(self) -> Parameters:
        """The matrix, under `weight`."""
        return self._linear.parameters()
