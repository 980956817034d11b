"""Rotary tables: the cosine and sine of every position's angles, in float32.

Source: the exponent's denominator is the number of rotated dimensions, not the head size; llama3 scaling stretches
the wavelengths that are long against the original context and leaves the short ones alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srt.configs.step3p7 import Llama3Scaling, RopeConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per position of each pair of dimensions, [R / 2] float32, fastest first."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    return frequencies if rope.scaling is None else _stretched(frequencies, rope.scaling)


def _stretched(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Keep frequencies that turn often in the original context, divide those that hardly turn, blend between."""
    turns = scaling.original_positions / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rope_table(rope: RopeConfig, positions: int) -> Tensor:
    """Rotations of positions [0, positions): [positions, R] float32, cosines in the first half, sines in the second."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(rope)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rows: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head, pairing dimension j with j + R / 2; the rest passes through.

    Shapes: x [T, heads, D] float32; rows [T, R], the table's rows of the tokens' positions.
    """
    half = rows.shape[-1] // 2
    cos, sin = rows[:, None, :half], rows[:, None, half:]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
