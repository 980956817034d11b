"""Which experts, and which part of their width, lie on which rank.

`--ep-size` ranks (or groups of ranks) share the experts out; within such a group each expert's width is split.
Rank r of R with E groups holds the experts of group r // (R / E) and the r % (R / E)-th part of their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from srt.configs.step3p7 import MoeConfig
from srt.distributed import TensorGroup
from srt.layers.ops import Choice
from srt.layers.quant.contract import WeightFormat


@dataclass(frozen=True)
class Placement:
    """One rank's share: experts [first, first + experts) of `all_experts`, columns [start, start + width) of them."""

    all_experts: int
    first: int
    experts: int
    start: int
    width: int

    def local(self, choice: Choice) -> Choice:
        """A choice among all experts as one among this rank's; experts of other ranks become id `experts`."""
        if self.experts == self.all_experts:
            return choice
        here = (choice.ids >= self.first) & (choice.ids < self.first + self.experts)
        return Choice(torch.where(here, choice.ids - self.first, self.experts), choice.weights)


def place(group: TensorGroup, ep_size: int, moe: MoeConfig, weights: WeightFormat) -> Placement:
    """The share of one rank; widths are cut where the weight format allows it.

    Raises: ValueError that names the sizes that would work.
    """
    rank, ranks, experts, width = group.rank, group.size, moe.experts, moe.width
    grain = math.lcm(weights.split_rows, weights.split_columns)
    if ranks % ep_size or experts % ep_size:
        legal = _legal(ranks, lambda size: ranks % size == 0 and experts % size == 0)
        raise ValueError(f"--ep-size {ep_size} does not share out {experts} experts over {ranks} ranks; legal: {legal}")
    parts = ranks // ep_size
    if parts > 1 and width % (parts * grain):
        legal = _legal(width, lambda size: size == 1 or width % (size * grain) == 0)
        raise ValueError(
            f"an expert width of {width} does not split over {parts} ranks (tensor-parallel size {ranks} / "
            f"expert-parallel size {ep_size}) at multiples of {grain}; it splits over {legal}"
        )
    share, count = width // parts, experts // ep_size
    return Placement(experts, rank // parts * count, count, rank % parts * share, share)


def _legal(most: int, works: Callable[[int], bool]) -> str:
    return ", ".join(str(size) for size in range(1, most + 1) if works(size))
