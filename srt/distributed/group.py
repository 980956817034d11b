"""What layers ask of the ranks that share a model."""

from __future__ import annotations

from typing import Final

from torch import Tensor

COLLECTIVE_TIMEOUT_S: Final = 300.0
"""A rank that waits this long for another fails; the supervisor notices a lost rank long before."""


class TensorGroup:
    """The ranks that share one model. This one is a group of one: every collective is the identity."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; equal bits on all ranks."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate over ranks along the last dimension: [..., N] -> [..., size * N]."""
        return x

    def describe(self) -> str:
        """How the ranks talk, for the start-up table; empty if there is nobody to talk to."""
        return ""

    def share(self, total: int) -> int:
        """This rank's part of `total`. Raises: ValueError if `total` does not divide evenly."""
        if total % self.size:
            raise ValueError(f"{total} does not divide by the tensor-parallel size {self.size}")
        return total // self.size
