"""What the backends for GPUs must know of the GPU before they touch it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gpu:
    """The GPU of this process."""

    capability: tuple[int, int]
    """Compute capability, for instance (9, 0) for Hopper and (10, 0) for Blackwell's data-centre chips."""

    @property
    def text(self) -> str:
        """ "SM90"."""
        return f"SM{self.capability[0]}{self.capability[1]}"


def current_gpu() -> Gpu | None:
    """The GPU that torch would use now; None without one."""
    return Gpu(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host, for which the host does not wait."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
