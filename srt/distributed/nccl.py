"""Ranks that are GPUs of one machine. Every collective is queued on the current stream and may be part of a graph.

NCCL sums what is large. A decode step sums few tokens twice a layer, and there NCCL's own latency is most of the time;
those sums read the other rank's memory directly ("one shot"), where the GPUs can and there are two of them: with more,
ranks would add in different orders, and their bits might differ.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from srt.distributed.group import COLLECTIVE_TIMEOUT_S, TensorGroup

ONE_SHOT_BYTES: Final = 512 * 1024
"""Sums up to this size are read directly; beyond it NCCL's bandwidth wins."""

_untyped: Final[Any] = dist
"""torch's type stubs leave out the stores."""
_symmetric: Final[Any] = symmetric_memory
_operations: Final[Any] = torch.ops.symm_mem


class NcclGroup(TensorGroup):
    """Meets in a file and talks over NVLink or PCIe, whatever NCCL finds."""

    def __init__(self, rank: int, size: int, meeting: Path, device: torch.device) -> None:
        """Join the group; returns when all `size` ranks have. `meeting` is a file in a private directory."""
        self.rank, self.size = rank, size
        dist.init_process_group(
            "nccl",
            store=_untyped.FileStore(str(meeting), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device,
        )
        self._name: str = dist.group.WORLD.group_name if dist.group.WORLD is not None else ""
        self._shared: Tensor | None = None
        self._why = "NCCL; one-shot sums are for two ranks"
        if size == 2:
            self._share_memory(device)

    def _share_memory(self, device: torch.device) -> None:
        """Map a buffer of every rank into all of them, if the machine lets them. All ranks come to the same answer."""
        shared: Tensor | None = None
        try:
            shared = _symmetric.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
            _symmetric.rendezvous(shared, self._name)
            self._why = f"one-shot sums up to {ONE_SHOT_BYTES // 1024} KiB, NCCL beyond"
        except (RuntimeError, ImportError, AttributeError) as error:
            shared, self._why = None, f"NCCL; the GPUs share no memory: {str(error).splitlines()[0][:80]}"
        agreed = torch.tensor([shared is not None], dtype=torch.int32, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        self._shared = shared if agreed.item() else None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; equal bits on all ranks."""
        size = x.numel() * x.element_size()
        if self._shared is None or size > ONE_SHOT_BYTES or size % 16 or not x.is_contiguous():
            dist.all_reduce(x)
            return x
        mine = self._shared[:size].view(x.dtype).view(x.shape)
        mine.copy_(x)
        _operations.one_shot_all_reduce_out(mine, "sum", self._name, x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate over ranks along the last dimension: [..., N] -> [..., size * N]."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(parts, x.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def describe(self) -> str:
        """How the ranks talk."""
        return self._why
