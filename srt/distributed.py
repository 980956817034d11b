"""The tensor-parallel group as an object that is handed to layers; a group of one costs nothing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

_gloo: Final[Any] = dist
"""torch's type stubs leave out the process group classes."""
COLLECTIVE_TIMEOUT_S = 300.0
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

    def share(self, total: int) -> int:
        """This rank's part of `total`. Raises: ValueError if `total` does not divide evenly."""
        if total % self.size:
            raise ValueError(f"{total} does not divide by the tensor-parallel size {self.size}")
        return total // self.size


class GlooGroup(TensorGroup):
    """Ranks that are processes of one machine, on the CPU. They meet in a file and talk over loopback."""

    def __init__(self, rank: int, size: int, meeting: Path) -> None:
        """Join the group; returns when all `size` ranks have. `meeting` is a file in a private directory."""
        self.rank, self.size = rank, size
        options = _gloo.ProcessGroupGloo._Options()
        options._devices = [_gloo.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        store = _gloo.FileStore(str(meeting), size)
        self._group = _gloo.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; equal bits on all ranks."""
        self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate over ranks along the last dimension: [..., N] -> [..., size * N]."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)


def join_group(rank: int, size: int, directory: Path) -> TensorGroup:
    """The group of `size` ranks that meet in `directory`."""
    return TensorGroup() if size == 1 else GlooGroup(rank, size, directory / "tensor-group")
