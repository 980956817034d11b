"""What an expert runner does: E gated networks of width I, of which each token uses K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from srt.layers.ops import Choice


@dataclass(frozen=True)
class PackedExperts:
    """The experts' weights in the layout of the runner that packed them; I is this rank's width."""

    gate_up: Tensor
    down: Tensor
    experts: int
    width: int


class ExpertRunner(Protocol):
    """Runs the chosen experts of every token."""

    def pack(self, gate_up: Tensor, down: Tensor) -> PackedExperts:
        """Lay out the weights: gate_up [E, 2I, H] with the gate's rows first, down [E, H, I].

        The caller lets go of both afterwards.
        """
        ...

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts, limit: float | None) -> Tensor:
        """Sum over a token's experts of weight * down(gated_silu(gate_up(x), limit)): [T, H] -> [T, H]."""
        ...

    def run_with_shared(
        self,
        hidden: Tensor,
        choice: Choice,
        experts: PackedExperts,
        limit: float | None,
        shared: PackedExperts,
        shared_limit: float | None,
    ) -> Tensor:
        """`run` plus an expert that every token uses with weight 1; `shared` is packed as a layer of one expert."""
        ...
