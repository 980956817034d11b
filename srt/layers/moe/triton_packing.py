"""NVFP4 weights as the Triton kernels read them: four codes in a 16-bit word, four group scales in a 32-bit one.

Columns come in blocks of 256 where these divide a row, else of 128 or 64. A block of all rows of an expert lies before
the next one, so that what a program reads in a step lies together. A word of a block holds the codes of one column of
each of its quarters, at the same place: so the activations that meet a place lie together too. Scales likewise.

An even word and the odd one behind it are read as 32 bits, which lie so that the fewest shifts and masks make two
bfloat16 of the codes at one place, with as many of the shifts to the left as can be, since those may also be
multiplications:

    place   sign   exponent   fraction      brought to 15, 8 and 7, 6 by
    0       15     8, 7       6             nothing
    1       11     4, 3       2             << 4
    2       21     14, 13     12            turning right by 6
    3       17     10, 9      0             turning right by 2, and << 6 for the fraction

These are the even word's; the odd word's are 16 further, beyond 31 from 0 on again.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

COLUMNS: Final = 64
"""Columns of the smallest block; a row is padded to a multiple."""
GROUP: Final = 16
PLACES: Final = 4
BITS: Final = ((15, 8, 7, 6), (11, 4, 3, 2), (21, 14, 13, 12), (17, 10, 9, 0))
"""By place: where an even word's code has its sign, both bits of its exponent, and its fraction."""
FOLDED: Final = 256.0
"""The kernels' products are 2^-8 of the numbers; the matrix scale makes up for it."""
BLOCKS: Final = (256, 128, COLUMNS)
"""Sizes of blocks, of which the first that divides a row is taken."""
_SCALE_EXPONENT: Final = 21
_CHUNK: Final = 4
"""Experts regrouped at once: what needs memory beyond the result."""


def encode_words(packed: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """A stack of NVFP4 weights regrouped.

    Shapes: bytes [E, N, K / 2] uint8 and group scales [E, N, K / 16] e4m3, 64 a divisor of K ->
    words [E, K / B, N, B / 4] int16 and scales [E, K / B, N, B / 64] int32, B columns a block.
    Raises: ValueError if a group scale is not a number.
    """
    experts, rows, half = packed.shape
    block = block_columns(2 * half)
    blocks = 2 * half // block
    words = torch.empty(experts, blocks, rows, block // 4, dtype=torch.int16, device=packed.device)
    scales = torch.empty(experts, blocks, rows, block // 64, dtype=torch.int32, device=packed.device)
    # Groups of a block: first of each quarter, second of each, ...
    order = torch.arange(half // 8, device=packed.device).view(blocks, PLACES, -1).transpose(1, 2).flatten()
    tables = _tables(packed.device)
    for start in range(0, experts, _CHUNK):
        part = slice(start, start + _CHUNK)
        raw = group[part].contiguous().view(torch.uint8)[..., order]
        pairs = packed[part].unflatten(-1, (-1, GROUP // 2))[..., order, :]
        # Its scale's sign for both codes of a byte; nothing where the scale is zero.
        pairs = (pairs ^ ((raw >> 7) * 0x88)[..., None]) * ((raw & 0x7F) != 0)[..., None]
        words[part] = _words(pairs, tables).unflatten(-1, (blocks, -1)).transpose(1, 2)
        scales[part] = encode_scales(raw).unflatten(-1, (blocks, -1)).transpose(1, 2)
    return words, scales


def block_columns(columns: int) -> int:
    """Columns of a block of a row of so many, a multiple of 64."""
    return next(block for block in BLOCKS if columns % block == 0)


def _words(pairs: Tensor, tables: Tensor) -> Tensor:
    """Bytes of two codes each [.., K / 16, 8] -> [.., K / 4] int16."""
    first, second, third, last = pairs.unflatten(-2, (-1, PLACES)).to(torch.int32).unbind(-2)
    both = tables[0][first] | tables[1][second] | tables[2][third] | tables[3][last]
    return both.view(torch.int16).flatten(-2)


def _tables(device: torch.device) -> Tensor:
    """What a byte of two codes, the even column's in its low bits, is at each place of two words: [4, 256] int32."""
    codes = torch.arange(256)
    found = torch.zeros(PLACES, 256, dtype=torch.int64)
    for place, bits in enumerate(BITS):
        for odd in range(2):
            for bit, where in zip((3, 2, 1, 0), bits, strict=True):
                found[place] |= (codes >> (4 * odd + bit) & 1) << ((where + 16 * odd) % 32)
    return found.to(torch.int32).to(device)


def encode_scales(raw: Tensor) -> Tensor:
    """Bytes of e4m3 group scales [.., K / 16] -> [.., K / 64] int32, place p in the eight bits from 4 + 8 p on.

    A scale 2^e (1 + m / 8) becomes (e + 21) * 8 + m, of either kind (normal, subnormal): four bits up, below three set
    bits, that is a bfloat16, 2^118 times the scale. Places 0 and 2 lie there already, for two bfloat16 at once, and 1
    and 3 once the word is turned right by 8. The sign went to the codes; zero to any number.
    Raises: ValueError if one is not a number.
    """
    magnitude = (raw & 0x7F).to(torch.int32)
    if not raw.is_meta and bool((magnitude == 0x7F).any()):
        raise ValueError("a group scale is not a number")
    normal = magnitude + ((_SCALE_EXPONENT - 7) << 3)
    # m * 2^-9 for m in 1..7: the highest bit of m moves to the place before the fraction.
    shift = torch.where(magnitude >= 4, 1, torch.where(magnitude >= 2, 2, 3))
    subnormal = ((_SCALE_EXPONENT - 6 - shift) << 3) + ((magnitude << shift) & 7)
    first, second, third, last = torch.where(magnitude >= 8, normal, subnormal).unflatten(-1, (-1, PLACES)).unbind(-1)
    joined: Tensor = first << 4 | second << 12 | third << 20 | last << 28 | last >> 4
    return joined
