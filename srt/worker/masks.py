"""Which tokens grammars allow, applied to logits: the one seam between host masks and the device's logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srt.grammar.contract import Mask

Ints = NDArray[np.int64]


@dataclass
class Masks:
    """Masks of N of the L logits of a step: `rows` [N], rising, `bits` [N, W], one bit a token."""

    rows: Ints
    bits: Mask
    empty: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[N], after `apply`: where no token is left, so that what is sampled there means nothing."""

    def apply(self, logits: Tensor) -> None:
        """Make the logits [L, V] of what is not allowed minus infinity, in place. Last, after all other edits."""
        barred = _barred(self.bits, logits.shape[1], logits.device)
        first, last = int(self.rows[0]), int(self.rows[-1])
        alone = last - first + 1 == len(self.rows)  # no other rows among them: no copies are needed
        rows = torch.from_numpy(self.rows).to(logits.device)
        masked = (logits[first : last + 1] if alone else logits[rows]).masked_fill_(barred, -torch.inf)
        empty = masked.amax(dim=1) == -torch.inf
        self.empty = empty.cpu().numpy()
        if self.empty.any():
            masked[empty] = 0.0
        if not alone:
            logits[rows] = masked


def _barred(bits: Mask, size: int, device: torch.device) -> Tensor:
    """What masks do not allow: [N, size] bool. Only the bits travel to a device."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits((~bits).view(np.uint8), axis=1, bitorder="little", count=size)).bool()
    words = torch.from_numpy(bits).to(device)
    ones = (words[:, :, None] >> torch.arange(32, device=device)) & 1
    return ones.view(len(bits), -1)[:, :size] == 0
