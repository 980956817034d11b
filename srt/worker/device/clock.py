"""Points in a device's work: whether they have passed, and how far apart they were."""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the order of what was enqueued."""

    def passed(self) -> bool:
        """Whether the device has come so far."""
        ...

    def wait(self) -> None:
        """Return once it has."""
        ...


class Clock(Protocol):
    """Makes marks."""

    def mark(self) -> Mark:
        """The point behind all that was enqueued so far."""
        ...

    def between_us(self, earlier: Mark, later: Mark) -> int:
        """Microseconds of the device between two marks that have passed."""
        ...

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy on the host, which is there once a mark that is made afterwards has passed."""
        ...


class HostMark:
    """Work on the host is done when the next line runs."""

    def __init__(self) -> None:
        self.at_ns = time.perf_counter_ns()

    def passed(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


class HostClock:
    """For tensors in host memory."""

    def mark(self) -> Mark:
        """Now."""
        return HostMark()

    def between_us(self, earlier: Mark, later: Mark) -> int:
        """Difference of two readings of the host's clock."""
        assert isinstance(earlier, HostMark) and isinstance(later, HostMark)
        return (later.at_ns - earlier.at_ns) // 1_000

    def to_host(self, tensor: Tensor) -> Tensor:
        """It is there."""
        return tensor


class CudaMark:
    """An event in the current stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def passed(self) -> bool:
        """Asks the driver; does not wait."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Spins: a step is short."""
        self.event.synchronize()


class CudaClock:
    """For tensors on the current CUDA device."""

    def mark(self) -> Mark:
        """An event behind all that is in the stream."""
        return CudaMark()

    def between_us(self, earlier: Mark, later: Mark) -> int:
        """The GPU's own measurement, half a microsecond fine."""
        assert isinstance(earlier, CudaMark) and isinstance(later, CudaMark)
        return int(earlier.event.elapsed_time(later.event) * 1e3)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Into page-locked memory, behind the stream's work."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
