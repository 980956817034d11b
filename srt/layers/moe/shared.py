"""The shared expert in plain torch, for runners that do not compute it together with the routed ones."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from srt.layers.moe.contract import ExpertShape, PackedExperts, StoredExperts
from srt.layers.ops import TorchOps


class PlainShared:
    """Base of runners: the shared expert as two products and an activation."""

    def pack_shared(self, shared: StoredExperts, shape: ExpertShape) -> PackedExperts:
        return PackedExperts(shape, {"gate_up": shared.gate_up.weight[0], "down": shared.down.weight[0]})

    def run_shared(self, hidden: Tensor, shared: PackedExperts) -> Tensor:
        """[T, H] -> [T, H]."""
        gate_up = functional.linear(hidden, shared.tensors["gate_up"])
        return functional.linear(TorchOps().gated_silu(gate_up, shared.shape.limit), shared.tensors["down"])
