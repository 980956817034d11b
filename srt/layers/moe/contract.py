"""What an expert runner does: E gated networks of width I, of which each token uses K.

A layer's routed experts go through three stages. *Dispatch* translates the router's choice, which speaks of all experts
of the layer, into this rank's (`Placement.local`). *Run* is the runner's. *Combine* is the sum over ranks that
the decoder layer makes anyway: ranks that hold other experts, or other columns of the same ones, add theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from srt.layers.moe.placement import Placement
from srt.layers.ops import Choice
from srt.layers.quant.contract import StoredWeight, WeightFormat

Route = Callable[[], Choice]
"""Chooses experts for the tokens at hand; to be called once."""


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of a layer's experts on this rank, and the clamp of their activation (None: no clamp)."""

    experts: int
    hidden: int
    width: int
    limit: float | None
    elsewhere: bool = False
    """Other ranks hold other experts of the layer: a choice may name id `experts`, which adds nothing here."""


@dataclass(frozen=True)
class StoredExperts:
    """The weights of a layer's experts as they came: gate_up [E, 2I, H] with the gate's rows first, down [E, H, I].

    Scales of the whole matrix have two entries in gate_up, the gate's first. Scales of the activations cover *all*
    experts of the layer, not only this rank's: the largest of them must be the same number on every rank.
    """

    gate_up: StoredWeight
    down: StoredWeight


@dataclass(frozen=True)
class PackedExperts:
    """The experts in the layout of the runner that packed them: tensors by its own keys."""

    shape: ExpertShape
    tensors: dict[str, Tensor]


class ExpertRunner(Protocol):
    """Runs the chosen experts of every token. One runner serves one weight format."""

    @property
    def weights(self) -> WeightFormat:
        """The format in which it takes the weights and keeps them in memory."""
        ...

    @property
    def width_multiple(self) -> int:
        """The width of a rank is padded with zeros to a multiple of this."""
        ...

    def refuses(self, shape: ExpertShape) -> str | None:
        """Why this layer cannot be computed exactly (its clamp included); None if it can."""
        ...

    def pack(self, experts: StoredExperts, shape: ExpertShape) -> PackedExperts:
        """Lay out the weights; the caller lets go of them afterwards."""
        ...

    def pack_shared(self, shared: StoredExperts, shape: ExpertShape) -> PackedExperts:
        """Lay out the shared expert, always plain numbers, as a layer of one expert."""
        ...

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        """Sum over a token's experts of weight * down(gated_silu(gate_up(x), limit)): [T, H] -> [T, H].

        An id equal to `experts.shape.experts` stands for an expert of another rank and adds nothing.
        """
        ...

    def run_with_shared(self, hidden: Tensor, route: Route, experts: PackedExperts, shared: PackedExperts) -> Tensor:
        """`run` plus the shared expert, which every token uses with weight 1 and which need not wait for the choice."""
        ...


def rank_shape(runner: ExpertRunner, place: Placement, hidden: int, limit: float | None) -> ExpertShape:
    """Sizes of one rank's experts, its width padded as the runner and its weight format need it."""
    weights = runner.weights
    multiple = math.lcm(runner.width_multiple, weights.split_rows, weights.split_columns)
    padded = -(-place.width // multiple) * multiple
    return ExpertShape(place.experts, hidden, padded, limit, elsewhere=place.experts < place.all_experts)
