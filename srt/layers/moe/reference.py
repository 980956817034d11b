"""Experts in plain torch: one after the other, each over the tokens that chose it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from srt.layers.moe.contract import PackedExperts
from srt.layers.ops import Choice, TorchOps


class ReferenceExperts:
    """The truth for the other runners. Weighted outputs are summed in float32 and rounded once."""

    def pack(self, gate_up: Tensor, down: Tensor) -> PackedExperts:
        return PackedExperts(gate_up, down, gate_up.shape[0], down.shape[2])

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts, limit: float | None) -> Tensor:
        ops = TorchOps()
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in torch.bincount(choice.ids.flatten()).nonzero()[:, 0].tolist():
            tokens, place = (choice.ids == expert).nonzero(as_tuple=True)
            gate_up = functional.linear(hidden[tokens], experts.gate_up[expert])
            down = functional.linear(ops.gated_silu(gate_up, limit), experts.down[expert])
            total.index_add_(0, tokens, down.float() * choice.weights[tokens, place, None])
        return total.to(hidden.dtype)
