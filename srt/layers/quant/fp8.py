"""FP8 in blocks: e4m3 codes, one float32 multiplier for every 128 x 128 of them.

The checkpoint calls the multiplier `weight_scale_inv`: a number is code * scale all the same. Activations are encoded
when they come: e4m3 codes, one float32 multiplier for every token and 128 columns.
Source: `quantization_config` of the published FP8 release (`weight_block_size` [128, 128], dynamic activations).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from srt.layers.quant.codes import E4M3, E4M3_MAX, encode_e4m3
from srt.layers.quant.contract import WEIGHT, Grid, StoredWeight, product, require_finite

BLOCK = 128
BLOCK_SCALE = "block_scale"


class Fp8Blocks:
    """e4m3 weights with a scale for each 128 x 128 block; blocks at the edges may be cut short."""

    name = "fp8"
    split_rows = BLOCK
    split_columns = BLOCK
    layer_wide: frozenset[str] = frozenset()

    def grids(self) -> Mapping[str, Grid]:
        return {WEIGHT: Grid(E4M3, 1, 1), BLOCK_SCALE: Grid(torch.float32, BLOCK, BLOCK)}

    def pack(self, weight: Tensor) -> StoredWeight:
        """A block's largest magnitude becomes 448. A block of zeros has scale 1."""
        wide = require_finite(weight)
        blocks = _blocks(wide)
        scale = _scale(blocks.abs().amax(dim=(-3, -1)))
        codes = encode_e4m3(blocks / scale[..., :, None, :, None])
        return StoredWeight(tuple(weight.shape), {WEIGHT: _joined(codes, wide.shape), BLOCK_SCALE: scale})

    def unpack(self, stored: StoredWeight) -> Tensor:
        blocks = _blocks(stored.weight.float())
        return _joined(blocks * stored.tensors[BLOCK_SCALE][..., :, None, :, None], torch.Size(stored.shape))

    def matmul(self, x: Tensor, stored: StoredWeight) -> Tensor:
        return product(x, self.unpack(stored))

    def matmul_coded(self, x: Tensor, stored: StoredWeight) -> Tensor:
        codes, scale = encode_tokens(x)
        return product(decode_tokens(codes, scale), self.unpack(stored)).to(x.dtype)


def encode_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [T, K] -> (e4m3 codes [T, K], float32 multipliers [T, ceil(K / 128)]), largest magnitude 448."""
    blocks = torch.unflatten(functional.pad(x.float(), (0, -x.shape[-1] % BLOCK)), -1, (-1, BLOCK))
    scale = _scale(blocks.abs().amax(dim=-1))
    return encode_e4m3(blocks / scale[..., None]).flatten(-2)[..., : x.shape[-1]].contiguous(), scale


def decode_tokens(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers that encoded activations stand for, float32."""
    return codes.float() * scale.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]


def _scale(largest: Tensor) -> Tensor:
    """The multiplier that brings `largest` to 448, never below the least normal number; 1 for a block of zeros."""
    scale = (largest / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scale, torch.ones_like(largest))


def _blocks(weight: Tensor) -> Tensor:
    """[.., N, K] -> [.., N / 128, 128, K / 128, 128], padded with zeros."""
    rows, columns = weight.shape[-2:]
    padded = functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return torch.unflatten(torch.unflatten(padded, -1, (-1, BLOCK)), -3, (-1, BLOCK))


def _joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of `_blocks` for a weight of this shape."""
    return blocks.flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]].contiguous()
