"""A mixture-of-experts layer: route, run the chosen experts, add the shared one."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from srt.configs.step3p7 import LayerConfig, MoeConfig
from srt.layers.mlp import Mlp
from srt.layers.moe.contract import ExpertShape, PackedExperts, StoredExperts, rank_shape
from srt.layers.moe.placement import Placement, place
from srt.layers.moe.router import Router
from srt.layers.parameter import Cut, Parameter, Parameters, Piece, nested
from srt.layers.quant.contract import Grid, StoredWeight
from srt.layers.toolkit import Toolkit


class MoeBlock:
    """Routed experts plus a shared expert that is neither gated nor scaled; experts and widths are split over ranks.

    Raises: ValueError if experts or widths do not divide as asked; the message names the sizes that would.
    """

    def __init__(self, moe: MoeConfig, layer: LayerConfig, hidden_size: int, tools: Toolkit) -> None:
        self._runner = tools.experts[layer.index]
        self._router = Router(moe, hidden_size, tools.ops)
        self._shared = Mlp(hidden_size, moe.shared_width, layer.shared_limit, tools)
        weights = self._runner.weights
        self._place = place(tools.group, tools.ep_size, moe, weights)
        self._shape = rank_shape(self._runner, self._place, hidden_size, layer.limit)
        self._experts: PackedExperts
        self._stored: dict[str, Tensor] = {}
        self._parameters: Parameters = {}
        for key, grid in weights.grids().items():
            wide = key in weights.layer_wide
            for name, build in (("gate_up", _gate_up), ("down", _down)):
                shape, pieces = build(grid, self._place, moe.width, self._shape, wide)
                path = f"{name}.{key}"
                self._parameters[path] = Parameter.merged(shape, grid.dtype, pieces, partial(self._take, path))

    def _take(self, path: str, tensor: Tensor) -> None:
        """Keep a tensor until the last one has come, then pack them all."""
        self._stored[path] = tensor
        if len(self._stored) < len(self._parameters):
            return
        shape, keys = self._shape, self._runner.weights.grids()
        gate_up = {key: self._stored.pop(f"gate_up.{key}") for key in keys}
        down = {key: self._stored.pop(f"down.{key}") for key in keys}
        stored = StoredExperts(
            gate_up=StoredWeight((shape.experts, 2 * shape.width, shape.hidden), gate_up),
            down=StoredWeight((shape.experts, shape.hidden, shape.width), down),
        )
        self._experts = self._runner.pack(stored, shape)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]: this rank's part of a sum over ranks."""
        choice = self._place.local(self._router(x))
        routed = self._runner.run(x, choice, self._experts)
        return routed.add_(self._shared(x))

    def parameters(self) -> Parameters:
        """`router.*`, `experts.gate_up.*` (pieces gate, up), `experts.down.*`, `shared.*`.

        The experts' last words are the keys of their weight format.
        """
        router, shared = nested("router", self._router.parameters()), nested("shared", self._shared.parameters())
        return router | nested("experts", self._parameters) | shared


Build = tuple[tuple[int, ...], dict[str, Piece]]
"""Shape of a parameter on this rank, and its pieces."""


def _gate_up(grid: Grid, place: Placement, width: int, shape: ExpertShape, wide: bool) -> Build:
    """One tensor of the merged gate and up weights: rows are the width."""
    whole = grid.shape((place.all_experts, width, shape.hidden))
    experts = () if wide else (Cut(0, place.first, place.experts),)
    count = place.all_experts if wide else place.experts
    if grid.rows is None:
        pieces = {name: Piece(whole, experts, (Cut(1, half, 1),)) for half, name in enumerate(("gate", "up"))}
        return (count, 2), pieces
    start, mine, padded = (-(-size // grid.rows) for size in (place.start, place.width, shape.width))
    pieces = {
        name: Piece(whole, (*experts, Cut(1, start, mine)), (Cut(1, half * padded, mine),))
        for half, name in enumerate(("gate", "up"))
    }
    return (count, 2 * padded, whole[2]), pieces


def _down(grid: Grid, place: Placement, width: int, shape: ExpertShape, wide: bool) -> Build:
    """One tensor of the down weights: columns are the width."""
    whole = grid.shape((place.all_experts, shape.hidden, width))
    experts = () if wide else (Cut(0, place.first, place.experts),)
    count = place.all_experts if wide else place.experts
    if grid.columns is None:
        return (count, 1), {"": Piece(whole, experts)}
    start, mine, padded = (-(-size // grid.columns) for size in (place.start, place.width, shape.width))
    return (count, whole[1], padded), {"": Piece(whole, (*experts, Cut(2, start, mine)), (Cut(2, 0, mine),))}
