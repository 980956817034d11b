"""Ranks that are processes of one machine, on the CPU."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from srt.distributed.group import COLLECTIVE_TIMEOUT_S, TensorGroup

_gloo: Final[Any] = dist
"""torch's type stubs leave out the process group classes."""


class GlooGroup(TensorGroup):
    """Meets in a file and talks over loopback."""

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

    def describe(self) -> str:
        """How the ranks talk."""
        return "gloo over loopback"
