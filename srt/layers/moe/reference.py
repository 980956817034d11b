"""Experts in plain torch: one after the other, each over the tokens that chose it."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.layers.moe.contract import ExpertShape, PackedExperts, Route, StoredExperts
from srt.layers.moe.shared import PlainShared
from srt.layers.ops import Choice, TorchOps
from srt.layers.quant.contract import StoredWeight, WeightFormat


class ReferenceExperts(PlainShared):
    """The truth for the other runners, in any weight format. Weighted outputs are summed in float32, rounded once.

    With `coded`, activations are encoded as a kernel that multiplies codes would do it (FP8 by FP8, NVFP4 by
    NVFP4); without, they are used as they are and the weights are exactly what their codes stand for.
    """

    width_multiple = 1

    def __init__(self, weights: WeightFormat, coded: bool = False) -> None:
        self.weights = weights
        self._matmul = weights.matmul_coded if coded else weights.matmul

    def refuses(self, shape: ExpertShape) -> str | None:
        return None

    def pack(self, experts: StoredExperts, shape: ExpertShape) -> PackedExperts:
        tensors = {f"gate_up.{key}": tensor for key, tensor in experts.gate_up.tensors.items()}
        return PackedExperts(shape, tensors | {f"down.{key}": tensor for key, tensor in experts.down.tensors.items()})

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        return self._routed(hidden, choice, experts).to(hidden.dtype)

    def run_with_shared(self, hidden: Tensor, route: Route, experts: PackedExperts, shared: PackedExperts) -> Tensor:
        total = self._routed(hidden, route(), experts) + self.run_shared(hidden, shared).float()
        return total.to(hidden.dtype)

    def _routed(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        """Weighted sum over the chosen experts: [T, H] -> [T, H] float32."""
        shape = experts.shape
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        counts = torch.bincount(choice.ids.flatten(), minlength=shape.experts)[: shape.experts]
        for expert in counts.nonzero()[:, 0].tolist():
            tokens, place = (choice.ids == expert).nonzero(as_tuple=True)
            output = self.expert(hidden[tokens], experts, expert)
            total.index_add_(0, tokens, output.float() * choice.weights[tokens, place, None])
        return total

    def expert(self, hidden: Tensor, experts: PackedExperts, number: int) -> Tensor:
        """One expert over the tokens that chose it: [C, H] -> [C, H]."""
        return self._matmul(self.inner(hidden, experts, number), self._weight(experts, "down", number))

    def inner(self, hidden: Tensor, experts: PackedExperts, number: int) -> Tensor:
        """What enters its down product: [C, H] -> [C, I]."""
        gate_up = self._matmul(hidden, self._weight(experts, "gate_up", number))
        return TorchOps().gated_silu(gate_up, experts.shape.limit)

    def _weight(self, experts: PackedExperts, name: str, expert: int) -> StoredWeight:
        """One expert's matrix. Scales of the activations stay whole: they belong to the layer."""
        shape, limits = experts.shape, self.weights.layer_wide
        rows, columns = (2 * shape.width, shape.hidden) if name == "gate_up" else (shape.hidden, shape.width)
        tensors = {
            key: experts.tensors[f"{name}.{key}"] if key in limits else experts.tensors[f"{name}.{key}"][expert]
            for key in self.weights.grids()
        }
        return StoredWeight((rows, columns), tensors)
