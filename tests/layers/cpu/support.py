"""What the tests of the native kernels share: tolerances and a comparison."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

DTYPES: Final = (torch.float32, torch.bfloat16)

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error allowed, against the largest value. A bfloat16 result is off by up to 2^-9 of itself from its own
rounding, and by about as much again for each rounded intermediate."""


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """`actual` equals `expected` (float64) to within the tolerance of its dtype, relative to the largest value."""
    assert actual.shape == expected.shape
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = (actual.double() - expected).abs().max().item() / expected.abs().max().clamp(min=1e-30).item()
    assert error <= limit, f"relative error {error:.2e}, allowed {limit:.2e}"


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gated(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    if limit is None:
        return silu(gate) * up
    return torch.minimum(silu(gate), torch.tensor(limit, dtype=gate.dtype)) * up.clamp(-limit, limit)
