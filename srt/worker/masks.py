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
    """Masks of N of the L logits of a step: `rows` [N], `bits` [N, W], one bit a token."""

    rows: Ints
    bits: Mask
    empty: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[N], after `apply`: where no token is left, so that what is sampled there means nothing."""

    def apply(self, logits: Tensor) -> None:
        """Make the logits [L, V] of what is not allowed minus infinity, in place. Last, after all other edits."""
        size = logits.shape[1]
        allowed = np.unpackbits(self.bits.view(np.uint8), axis=1, bitorder="little", count=size).view(np.bool_)
        rows = torch.from_numpy(self.rows).to(logits.device)
        masked = logits[rows].masked_fill_(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
        empty = masked.amax(dim=1) == -torch.inf
        self.empty = empty.cpu().numpy()
        if self.empty.any():
            masked[empty] = 0.0
        logits[rows] = masked
