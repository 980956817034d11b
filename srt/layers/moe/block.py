"""A mixture-of-experts layer: route, run the chosen experts, add the shared one."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.configs.step3p7 import LayerConfig, MoeConfig
from srt.layers.moe.contract import ExpertRunner, PackedExperts
from srt.layers.moe.router import Router
from srt.layers.parameter import Cut, Parameter, Parameters, Piece, nested
from srt.layers.toolkit import Toolkit


class Experts:
    """The weights of a stack of experts; the width is split over the ranks.

    A checkpoint has them stacked, [E, I, H], or, for the one shared expert, plain, [I, H].
    Raises: ValueError if the width does not divide by the number of ranks.
    """

    def __init__(self, stack: tuple[int, ...], width: int, hidden_size: int, tools: Toolkit) -> None:
        self._runner = tools.experts
        self._halves: dict[str, Tensor] = {}
        self.packed: PackedExperts
        share = tools.group.share(width)
        start, rows = tools.group.rank * share, len(stack)
        whole = (*stack, width, hidden_size)
        gate = Piece(whole, Cut(rows, start, share), Cut(rows, 0, share))
        up = Piece(whole, Cut(rows, start, share), Cut(rows, share, share))
        down = Piece((*stack, hidden_size, width), Cut(rows + 1, start, share))
        self._parameters = {
            "gate_up.weight": self._parameter((*stack, 2 * share, hidden_size), {"gate": gate, "up": up}, tools.dtype),
            "down.weight": self._parameter((*stack, hidden_size, share), {"": down}, tools.dtype),
        }

    def _parameter(self, shape: tuple[int, ...], pieces: dict[str, Piece], dtype: torch.dtype) -> Parameter:
        half = "down" if "" in pieces else "gate_up"

        def take(weight: Tensor) -> None:
            """Keep one of the two weights until the other has come, then pack both."""
            self._halves[half] = weight if weight.dim() == 3 else weight[None]
            if len(self._halves) == 2:
                self.packed = self._runner.pack(self._halves.pop("gate_up"), self._halves.pop("down"))

        return Parameter.merged(shape, dtype, pieces, take)

    def parameters(self) -> Parameters:
        """`gate_up.weight` (pieces gate, up) and `down.weight`."""
        return self._parameters


class MoeBlock:
    """Routed experts plus a shared expert that is neither gated nor scaled."""

    def __init__(self, moe: MoeConfig, layer: LayerConfig, hidden_size: int, tools: Toolkit) -> None:
        self._runner: ExpertRunner = tools.experts
        self._limit, self._shared_limit = layer.limit, layer.shared_limit
        self._router = Router(moe, hidden_size, tools.ops)
        self._experts = Experts((moe.experts,), moe.width, hidden_size, tools)
        self._shared = Experts((), moe.shared_width, hidden_size, tools)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]: this rank's part of a sum over ranks."""
        choice = self._router(x)
        return self._runner.run_with_shared(
            x, choice, self._experts.packed, self._limit, self._shared.packed, self._shared_limit
        )

    def parameters(self) -> Parameters:
        """`router.*`, `experts.*`, `shared.*`."""
        return (
            nested("router", self._router.parameters())
            | nested("experts", self._experts.parameters())
            | nested("shared", self._shared.parameters())
        )
