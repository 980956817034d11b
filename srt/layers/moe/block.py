"""A mixture-of-experts layer: route, run the chosen experts and the shared one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from srt.configs.step3p7 import LayerConfig, MoeConfig
from srt.layers.moe.contract import ExpertShape, PackedExperts, StoredExperts, rank_shape
from srt.layers.moe.placement import Placement, place
from srt.layers.moe.router import Router
from srt.layers.parameter import Cut, Parameter, Parameters, Piece, nested
from srt.layers.quant.contract import WEIGHT, Grid, StoredWeight, WeightFormat
from srt.layers.toolkit import Toolkit

Build = tuple[tuple[int, ...], dict[str, Piece]]
"""Shape of a parameter on this rank, and its pieces."""
Pack = Callable[[StoredExperts, ExpertShape], PackedExperts]


class MoeBlock:
    """Routed experts plus a shared expert that is neither gated nor scaled.

    Routed experts are shared out over groups of ranks, and split by width within a group; the shared one is split by
    width over all ranks.
    Raises: ValueError if experts or widths do not divide as asked; the message names the sizes that would.
    """

    def __init__(self, moe: MoeConfig, layer: LayerConfig, hidden_size: int, tools: Toolkit) -> None:
        self._runner = tools.experts[layer.index]
        self._router = Router(moe, hidden_size, tools.ops)
        weights, group = self._runner.weights, tools.group
        self._place = place(group, tools.ep_size, moe, weights)
        shape = rank_shape(self._runner, self._place, hidden_size, layer.limit)
        self._experts = Experts(shape, self._runner.pack, _routed(weights, self._place, moe.width, shape))
        share = group.share(moe.shared_width)
        shape = ExpertShape(1, hidden_size, share, layer.shared_limit)
        start, grid = group.rank * share, Grid(tools.dtype, 1, 1)
        self._shared = Experts(shape, self._runner.pack_shared, _shared(grid, start, moe.shared_width, shape))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]: this rank's part of a sum over ranks."""
        return self._runner.run_with_shared(
            x, lambda: self._place.local(self._router(x)), self._experts.packed, self._shared.packed
        )

    def parameters(self) -> Parameters:
        """`router.*`, and for `experts` and `shared`: `gate_up.*` (pieces gate, up), `down.*`.

        The last words are the keys of the weight format.
        """
        return (
            nested("router", self._router.parameters())
            | nested("experts", self._experts.parameters)
            | nested("shared", self._shared.parameters)
        )


class Experts:
    """Weights of a stack of experts; packed once the last tensor has come."""

    def __init__(self, shape: ExpertShape, pack: Pack, builds: Mapping[str, tuple[Grid, Build]]) -> None:
        self._shape, self._pack = shape, pack
        self._stored: dict[str, Tensor] = {}
        self.packed: PackedExperts
        self.parameters: Parameters = {
            path: Parameter.merged(size, grid.dtype, pieces, partial(self._take, path))
            for path, (grid, (size, pieces)) in builds.items()
        }
        """`gate_up.KEY` and `down.KEY` for each key of the weight format."""

    def _take(self, path: str, tensor: Tensor) -> None:
        self._stored[path] = tensor
        if len(self._stored) < len(self.parameters):
            return
        shape = self._shape
        gate_up = StoredWeight((shape.experts, 2 * shape.width, shape.hidden), self._part("gate_up."))
        down = StoredWeight((shape.experts, shape.hidden, shape.width), self._part("down."))
        self._stored = {}
        self.packed = self._pack(StoredExperts(gate_up, down), shape)

    def _part(self, prefix: str) -> dict[str, Tensor]:
        found = {path[len(prefix) :]: tensor for path, tensor in self._stored.items() if path.startswith(prefix)}
        return {key: tensor if tensor.dim() > 2 or key != WEIGHT else tensor[None] for key, tensor in found.items()}


def _routed(weights: WeightFormat, place: Placement, width: int, shape: ExpertShape) -> dict[str, tuple[Grid, Build]]:
    """Every tensor of a layer's routed experts."""
    builds = {}
    for key, grid in weights.grids().items():
        wide = key in weights.layer_wide
        builds[f"gate_up.{key}"] = grid, _gate_up(grid, place, width, shape, wide)
        builds[f"down.{key}"] = grid, _down(grid, place, width, shape, wide)
    return builds


def _shared(grid: Grid, start: int, width: int, shape: ExpertShape) -> dict[str, tuple[Grid, Build]]:
    """The shared expert: matrices without a stack in the checkpoint."""
    share, hidden = shape.width, shape.hidden
    mine = (Cut(0, start, share),)
    halves = {
        name: Piece((width, hidden), mine, (Cut(0, half * share, share),)) for half, name in enumerate(("gate", "up"))
    }
    down = {"": Piece((hidden, width), (Cut(1, start, share),))}
    return {
        f"gate_up.{WEIGHT}": (grid, ((2 * share, hidden), halves)),
        f"down.{WEIGHT}": (grid, ((hidden, share), down)),
    }


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
