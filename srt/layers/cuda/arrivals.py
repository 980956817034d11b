"""What the last program of a kernel does for all of them, in place of a second kernel behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


class Counter:
    """Numbers on each device by which programs count themselves in: zero before a kernel and behind it.

    They stay where they are, for recorded kernels go on using them. Kernels of one stream may share them, since none
    counts before it has taken over (`srt/layers/cuda/launch.py`); kernels that run at the same time may not.
    """

    def __init__(self, size: int = 1) -> None:
        self._size = size
        self._made: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Those of a device: [size] int32.

        Raises: RuntimeError if a kernel is recorded that has never been run there; the record would own the numbers.
        """
        if device not in self._made:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("run a kernel that counts its programs once before you record it")
            self._made[device] = torch.zeros(self._size, dtype=torch.int32, device=device)
        return self._made[device]


@triton.jit  # type: ignore[untyped-decorator]
def last_to_arrive(counter: tl.tensor, programs: tl.tensor) -> tl.tensor:
    """Count this program in; whether it is the last of so many, which may load what any of them stored before.

    The barrier puts the stores of all threads before the one thread that counts. Its addition releases them to the
    whole GPU, and acquires what the programs released that counted before, as each reads what the one before it wrote.
    The other threads get the sum from that thread, behind one more barrier, and so load after it. They have to load
    with `cache_modifier=".cg"`, past their multiprocessor's own cache, which does not hear of stores by others.

    The last one puts the counter back to zero: no other program will look at it, and the next kernel waits for this.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
