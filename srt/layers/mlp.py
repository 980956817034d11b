"""The gated feed-forward network: dense layers and the shared expert."""

from __future__ import annotations

from torch import Tensor

from srt.layers.linear import column_linear, row_linear
from srt.layers.parameter import Parameters, nested
from srt.layers.toolkit import Toolkit


class Mlp:
    """down(silu(gate(x)) * up(x)) with an optional clamp; the width is split over the ranks."""

    def __init__(self, hidden_size: int, width: int, limit: float | None, tools: Toolkit) -> None:
        self._ops, self._limit = tools.ops, limit
        outputs = {"gate": width, "up": width}
        self._gate_up = column_linear(tools.linear, tools.group, tools.dtype, hidden_size, outputs)
        self._down = row_linear(tools.linear, tools.group, tools.dtype, width, hidden_size)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]: this rank's part of a sum over ranks."""
        return self._down(self._ops.gated_silu(self._gate_up(x), self._limit))

    def parameters(self) -> Parameters:
        """`gate_up.weight` (pieces gate, up) and `down.weight`."""
        return nested("gate_up", self._gate_up.parameters()) | nested("down", self._down.parameters())
