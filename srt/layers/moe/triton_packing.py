"""NVFP4 weights as the Triton kernels read them: four codes in a 16-bit word, four group scales in a 32-bit one.

Word j of a block of 64 columns holds the codes of columns j, 16 + j, 32 + j and 48 + j, one of each group of 16. Their
bits lie so that few shifts and masks make a bfloat16 of a code, two words at a time:

    place   sign   exponent   fraction      brought to 15, 8 and 7, 6 by
    0       15     8, 7       6             nothing
    1       12     5, 4       3             << 3
    2       14     2, 1       0             << 1, << 6
    3       13     11, 10     9             << 2, >> 3
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

COLUMNS: Final = 64
"""Columns of a block of words; a row is padded to a multiple."""
GROUP: Final = 16
PLACES: Final = 4
BITS: Final = ((15, 6), (12, 3), (14, 0), (13, 9))
"""Of a code by place: its sign, and the lowest of the other three."""
FOLDED: Final = 256.0
"""The kernels' products are 2^-8 of the numbers; the matrix scale makes up for it."""
_SCALE_EXPONENT: Final = 21
_CHUNK: Final = 4
"""Experts regrouped at once: what needs memory beyond the result."""


def encode_words(packed: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """A stack of NVFP4 weights regrouped.

    Shapes: bytes [E, N, K / 2] uint8 and group scales [E, N, K / 16] e4m3, 64 a divisor of K ->
    words [E, N, K / 4] int16 and scales [E, N, K / 64] int32.
    Raises: ValueError if a group scale is not a number.
    """
    experts, rows, half = packed.shape
    words = torch.empty(experts, rows, half // 2, dtype=torch.int16, device=packed.device)
    scales = torch.empty(experts, rows, half // 32, dtype=torch.int32, device=packed.device)
    for start in range(0, experts, _CHUNK):
        part = slice(start, start + _CHUNK)
        raw = group[part].contiguous().view(torch.uint8)
        codes = torch.stack((packed[part] & 0xF, packed[part] >> 4), dim=-1).flatten(-2).unflatten(-1, (-1, GROUP))
        words[part] = _words(torch.where((raw & 0x7F)[..., None] == 0, 0, codes ^ ((raw >> 7) << 3)[..., None]))
        scales[part] = encode_scales(raw)
    return words, scales


def _words(codes: Tensor) -> Tensor:
    """Codes [.., K / 16, 16] -> [.., K / 4] int16."""
    wide = codes.to(torch.int32).unflatten(-2, (-1, PLACES))
    sign, exponent, fraction = wide >> 3, wide >> 1 & 3, wide & 1
    joined = torch.zeros_like(wide[..., 0, :])
    for place, (top, low) in enumerate(BITS):
        joined |= (sign << top | exponent << (low + 1) | fraction << low)[..., place, :]
    return _wrapped(joined, 16).to(torch.int16).flatten(-2)


def encode_scales(raw: Tensor) -> Tensor:
    """Bytes of e4m3 group scales [.., K / 16] -> [.., K / 64] int32, place p in byte (0, 1, 2, 3)[p].

    A scale 2^e (1 + m / 8) becomes (e + 21) * 8 + m, of either kind (normal, subnormal): moved four bits up below
    three set bits that is a bfloat16, 2^118 times the scale. The sign went to the codes; zero to any number.
    Raises: ValueError if one is not a number.
    """
    magnitude = (raw & 0x7F).to(torch.int32)
    if not raw.is_meta and bool((magnitude == 0x7F).any()):
        raise ValueError("a group scale is not a number")
    normal = magnitude + ((_SCALE_EXPONENT - 7) << 3)
    # m * 2^-9 for m in 1..7: the highest bit of m moves to the place before the fraction.
    shift = torch.where(magnitude >= 4, 1, torch.where(magnitude >= 2, 2, 3))
    subnormal = ((_SCALE_EXPONENT - 6 - shift) << 3) + ((magnitude << shift) & 7)
    bytes_ = torch.where(magnitude >= 8, normal, subnormal).unflatten(-1, (-1, PLACES)).long()
    return _wrapped(sum(bytes_[..., place] << (8 * place) for place in range(PLACES)), 32).to(torch.int32)


def _wrapped(unsigned: Tensor | int, bits: int) -> Tensor:
    """Unsigned numbers as the signed ones of the same bits."""
    assert isinstance(unsigned, Tensor)
    return torch.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned)
