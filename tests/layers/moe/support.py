"""Experts whose halves, scales and limits differ enough that a mix-up shows."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.layers.moe.contract import ExpertShape, StoredExperts
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.ops import Choice
from srt.layers.quant.contract import WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import INPUT_SCALE
from tests.support.experts import store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def lopsided(weights: WeightFormat, shape: ExpertShape, up_scale: float = 2.0) -> StoredExperts:
    """Encoded experts: gate, up and down, and one expert and the next, have magnitudes of their own."""
    growth = torch.linspace(0.5, 1.5, shape.experts, device=DEVICE)[:, None, None]

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.randn(shape.experts, rows, columns, device=DEVICE)
        return values.mul(growth).mul(scale * columns**-0.5)

    gate, up = (draw(shape.width, shape.hidden, scale) for scale in (1.0, up_scale))
    return store(weights, gate, up, draw(shape.hidden, shape.width, 1.0))


def ragged_choice(tokens: int, experts: int, top_k: int, empty: int = 1) -> Choice:
    """The first expert is everyone's, the last `empty` ones are nobody's, the rest are drawn."""
    rest = [torch.randperm(experts - empty - 1)[: top_k - 1] + 1 for _ in range(tokens)]
    ids = torch.cat([torch.zeros(tokens, 1, dtype=torch.long), torch.stack(rest)], dim=1)
    return Choice(ids.int().to(DEVICE), (torch.rand(tokens, top_k) + 0.1).to(DEVICE))


def truth(experts: StoredExperts, shape: ExpertShape, weights: WeightFormat, hidden: Tensor, choice: Choice) -> Tensor:
    """The reference runner in float32. FP8 blocks multiply codes by codes, NVFP4 (here) numbers by codes."""
    reference = ReferenceExperts(weights, coded=isinstance(weights, Fp8Blocks))
    return reference.run(hidden.float(), choice, reference.pack(experts, shape))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error by norm; infinite if anything is not finite."""
    ratio = float((found.float() - expected).norm() / expected.norm())
    return ratio if bool(torch.isfinite(found).all()) else float("inf")


def measured(experts: StoredExperts, first: float, second: float) -> StoredExperts:
    """The experts with input scales: the largest of each product's are these, and belong to the last expert."""
    for stored, largest in ((experts.gate_up, first), (experts.down, second)):
        scale = stored.tensors[INPUT_SCALE]
        grades = torch.linspace(0.3, 1.0, scale.numel(), device=scale.device).view(scale.shape)
        scale.copy_(grades * largest)
    return experts
