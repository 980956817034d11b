"""Small tensor operations behind one contract, with the plain torch version that is the truth for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Choice:
    """Experts of each token: ids [T, K] int32 and weights [T, K] float32, in order of falling biased score."""

    ids: Tensor
    weights: Tensor


class Ops(Protocol):
    """Operations between the matrix products. Inputs may be row-strided views; T is the number of tokens."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * (1 + weight) over the last dimension. float32 arithmetic, one rounding at the end.

        Shapes: x [T, H]; weight [H] holds gamma - 1, in x's dtype.
        """
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(s), s) for s = x + residual rounded to their dtype. May write into its inputs."""
        ...

    def gated_silu(self, gate_up: Tensor, limit: float | None) -> Tensor:
        """silu(a) * b, or min(silu(a), limit) * clamp(b, -limit, limit).

        Shapes: gate_up [T, 2I], a = its first half, b = its second -> [T, I].
        """
        ...

    def pack_router(self, weight: Tensor) -> Tensor:
        """Lay out a router's weight [E, H] float32 for `route`; the caller lets go of it afterwards."""
        ...

    def route(self, x: Tensor, packed: Tensor, bias: Tensor, *, top_k: int, factor: float) -> Choice:
        """The K experts with the largest sigmoid(logit) + bias, weighed by sigmoid(logit) alone.

        Logits are x times the router's weight, all in float32. Weights are normalised to sum to 1, then multiplied
        by `factor`.
        Shapes: x [T, H]; packed as `pack_router` made it; bias [E] float32.
        """
        ...

    def sample_greedy(self, logits: Tensor) -> Tensor:
        """Index of the largest logit, the lowest one among equals: [R, V] -> [R] int64."""
        ...

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`sample_greedy`, and for each row 1 if all its logits are finite, else 0: [R] int32."""
        ...


class TorchOps:
    """Plain torch."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * (1.0 + weight.float())).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def gated_silu(self, gate_up: Tensor, limit: float | None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = functional.silu(gate)
        if limit is None:
            return activated * up
        return activated.clamp(max=limit) * up.clamp(min=-limit, max=limit)

    def pack_router(self, weight: Tensor) -> Tensor:
        return weight

    def route(self, x: Tensor, packed: Tensor, bias: Tensor, *, top_k: int, factor: float) -> Choice:
        logits = functional.linear(x.float(), packed)
        return self.choose_experts(logits, bias, top_k=top_k, factor=factor)

    def choose_experts(self, logits: Tensor, bias: Tensor, *, top_k: int, factor: float) -> Choice:
        """The second half of `route`: logits [T, E] float32 to the chosen experts."""
        scores = logits.sigmoid()
        ids = (scores + bias).topk(top_k, dim=-1).indices
        chosen = scores.gather(-1, ids)
        # The tiny term only matters when every chosen sigmoid has underflowed to zero.
        weights = chosen * (factor / (chosen.sum(-1, keepdim=True) + 1e-20))
        return Choice(ids.to(torch.int32), weights)

    def sample_greedy(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        # One number for a row: anything that is not finite makes its sum so.
        return logits.argmax(dim=-1), logits.sum(dim=-1, dtype=torch.float32).isfinite().int()
