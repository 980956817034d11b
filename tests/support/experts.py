"""Routed experts for tests: random weights, packed for a runner as a layer would do it."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.layers.moe.contract import ExpertRunner, ExpertShape, PackedExperts, StoredExperts
from srt.layers.ops import Choice
from srt.layers.quant.contract import StoredWeight, WeightFormat


def stack(gate: StoredWeight, up: StoredWeight) -> StoredWeight:
    """Gate and up as one weight, the gate's rows first."""
    tensors = {key: torch.cat([gate.tensors[key], up.tensors[key]], dim=1) for key in gate.tensors}
    return StoredWeight((gate.shape[0], gate.shape[1] + up.shape[1], gate.shape[2]), tensors)


def store(weights: WeightFormat, gate: Tensor, up: Tensor, down: Tensor) -> StoredExperts:
    """Encode gate and up [E, I, H] and down [E, H, I]."""
    return StoredExperts(stack(weights.pack(gate), weights.pack(up)), weights.pack(down))


def pack_plain(runner: ExpertRunner, gate_up: Tensor, down: Tensor, limit: float | None = None) -> PackedExperts:
    """Pack plain weights, gate_up [E, 2I, H] and down [E, H, I]."""
    experts, hidden, width = down.shape
    stored = StoredExperts(*(StoredWeight(tuple(one.shape), {"weight": one}) for one in (gate_up, down)))
    return runner.pack(stored, ExpertShape(experts, hidden, width, limit))


def random_choice(tokens: int, experts: int, top_k: int, seed: int = 0) -> Choice:
    """Distinct random experts for each token, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return Choice(ids.int(), torch.rand(tokens, top_k, generator=generator) + 0.1)
