"""Kernels that begin while the one before them still runs ("programmatic dependent launch", Hopper and newer).

Such a kernel may fetch what nobody writes, the weights; before it touches anything else it takes over, which is to wait
for the kernel before it. Every kernel that is launched this way takes over, and so a kernel that has taken over knows
that all before it have ended.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from srt.layers.gpu import Gpu

FIRST: Final = (9, 0)
"""Least compute capability that can."""


class Launch(dict[str, bool]):
    """Launch options of a kernel with a parameter `PDL`."""

    def __init__(self, gpu: Gpu | None) -> None:
        early = gpu is not None and gpu.capability >= FIRST
        super().__init__(PDL=early, **({"launch_pdl": True} if early else {}))


@triton.jit  # type: ignore[untyped-decorator]
def take_over(PDL: tl.constexpr) -> None:
    """Wait for the kernel before this one to end, and let the one behind it begin."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
