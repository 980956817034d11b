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
        return _routed(hidden, choice, experts, limit).to(hidden.dtype)

    def run_with_shared(
        self,
        hidden: Tensor,
        choice: Choice,
        experts: PackedExperts,
        limit: float | None,
        shared: PackedExperts,
        shared_limit: float | None,
    ) -> Tensor:
        total = _routed(hidden, choice, experts, limit) + _expert(hidden, shared, 0, shared_limit).float()
        return total.to(hidden.dtype)


def _routed(hidden: Tensor, choice: Choice, experts: PackedExperts, limit: float | None) -> Tensor:
    """Weighted sum over the chosen experts: [T, H] -> [T, H] float32."""
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in torch.bincount(choice.ids.flatten()).nonzero()[:, 0].tolist():
        tokens, place = (choice.ids == expert).nonzero(as_tuple=True)
        output = _expert(hidden[tokens], experts, expert, limit)
        total.index_add_(0, tokens, output.float() * choice.weights[tokens, place, None])
    return total


def _expert(hidden: Tensor, experts: PackedExperts, number: int, limit: float | None) -> Tensor:
    gate_up = functional.linear(hidden, experts.gate_up[number])
    return functional.linear(TorchOps().gated_silu(gate_up, limit), experts.down[number])
