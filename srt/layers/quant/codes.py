"""The two small number formats: e2m1 (4 bits, two to a byte) and e4m3 (8 bits). Bit-exact in both directions.

Source: OCP Microscaling Formats v1.0 (e2m1), OCP 8-bit Floating Point v1.0 (e4m3, the variant without infinities).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

E4M3: Final = torch.float8_e4m3fn
E4M3_MAX: Final = 448.0
E2M1_MAX: Final = 6.0
E2M1_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Value of codes 0 to 7; bit 3 is the sign, so code 8 is minus zero."""
_MIDWAY_DOWN: Final = (0.25, 1.25, 2.5, 5.0)
"""Midpoints of neighbours of which the lower has the even code: a value exactly there goes down."""
_MIDWAY_UP: Final = (0.75, 1.75, 3.5)


def encode_e4m3(x: Tensor) -> Tensor:
    """Nearest e4m3 number, ties to even, beyond the range the largest one: float -> float8_e4m3fn."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def encode_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 code, ties to even, beyond the range the largest one: float -> uint8 in 0..15.

    The sign survives rounding to zero: -0.1 has code 8.
    """
    wide = x.float()
    magnitude = wide.abs()
    code = torch.zeros(wide.shape, dtype=torch.uint8, device=x.device)
    for midpoint in _MIDWAY_DOWN:
        code += magnitude > midpoint
    for midpoint in _MIDWAY_UP:
        code += magnitude >= midpoint
    return code | (torch.signbit(wide).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes 0..15 -> float32."""
    values = torch.tensor([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)], device=codes.device)
    return values[codes.int()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """[.., K] codes -> [.., K / 2] bytes: element 2j in the low four bits of byte j, 2j + 1 in the high four."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[.., K / 2] bytes -> [.., K] codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
