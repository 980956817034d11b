"""Muon: momentum whose matrices are made orthogonal before the step; matrices of one shape go together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(batch: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix [N, R, C] near 1 by Newton-Schulz steps."""
    x: Tensor = batch.bfloat16() if batch.is_cuda else batch.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    if tall:
        x = x.transpose(-2, -1)
    return x


class Muon:
    """The optimiser. Parameters of two or more dimensions; a stack [E, R, C] is E matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            rows, columns = self._matrix(parameter).shape[-2:]
            self.groups[rows, columns].append(parameter)
        self.buffers = {shape: [torch.zeros_like(p) for p in group] for shape, group in self.groups.items()}

    @staticmethod
    def _matrix(value: Tensor) -> Tensor:
        return value.flatten(1) if value.dim() == 4 else value

    @torch.no_grad()
    def step(self, rate: float, momentum: float | None = None) -> None:
        """Apply one step with the gradients at hand."""
        beta = self.momentum if momentum is None else momentum
        for (rows, columns), group in self.groups.items():
            gradients = [p.grad for p in group if p.grad is not None]
            if len(gradients) != len(group):
                continue
            buffers = self.buffers[rows, columns]
            torch._foreach_lerp_(buffers, gradients, 1 - beta)
            ahead = torch._foreach_lerp(gradients, buffers, beta)
            stacked = torch.cat([self._matrix(value).reshape(-1, rows, columns) for value in ahead])
            turned = orthogonal(stacked)
            scale = rate * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.decay)
            pieces = turned.split([p.numel() // (rows * columns) for p in group])
            updates = [piece.reshape(p.shape).to(p.dtype) for piece, p in zip(pieces, group, strict=True)]
            torch._foreach_add_(group, updates, alpha=-scale)
