"""A mixture-of-experts layer: route, run the chosen experts, add the shared one."""

from __future__ import annotations

from torch import Tensor

from srt.configs.step3p7 import LayerConfig, MoeConfig
from srt.layers.mlp import Mlp
from srt.layers.moe.contract import PackedExperts
from srt.layers.moe.router import Router
from srt.layers.parameter import Cut, Parameter, Parameters, Piece, nested
from srt.layers.toolkit import Toolkit


class MoeBlock:
    """Routed experts plus a shared expert that is neither gated nor scaled; widths are split over the ranks."""

    def __init__(self, moe: MoeConfig, layer: LayerConfig, hidden_size: int, tools: Toolkit) -> None:
        self._runner, self._limit = tools.experts, layer.limit
        self._router = Router(moe, hidden_size, tools.ops)
        self._shared = Mlp(hidden_size, moe.shared_width, layer.shared_limit, tools)
        self._experts: PackedExperts
        self._halves: dict[str, Tensor] = {}
        width = tools.group.share(moe.width)
        mine = tools.group.rank * width
        whole = (moe.experts, moe.width, hidden_size)
        self._parameters = {
            "experts.gate_up": Parameter.merged(
                (moe.experts, 2 * width, hidden_size),
                tools.dtype,
                {
                    "gate": Piece(whole, Cut(1, mine, width), Cut(1, 0, width)),
                    "up": Piece(whole, Cut(1, mine, width), Cut(1, width, width)),
                },
                lambda tensor: self._take("gate_up", tensor),
            ),
            "experts.down": Parameter.merged(
                (moe.experts, hidden_size, width),
                tools.dtype,
                {"": Piece((moe.experts, hidden_size, moe.width), Cut(2, mine, width))},
                lambda tensor: self._take("down", tensor),
            ),
        }

    def _take(self, half: str, tensor: Tensor) -> None:
        """Keep one of the two weights until the other has come, then pack both."""
        self._halves[half] = tensor
        if len(self._halves) == 2:
            self._experts = self._runner.pack(self._halves.pop("gate_up"), self._halves.pop("down"))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]: this rank's part of a sum over ranks."""
        routed = self._runner.run(x, self._router(x), self._experts, self._limit)
        return routed.add_(self._shared(x))

    def parameters(self) -> Parameters:
        """`router.*`, `experts.gate_up` (pieces gate, up), `experts.down`, `shared.*`."""
        router, shared = nested("router", self._router.parameters()), nested("shared", self._shared.parameters())
        return router | self._parameters | shared
