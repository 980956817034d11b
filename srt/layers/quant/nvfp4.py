"""NVFP4: e2m1 codes, an e4m3 scale for every 16 of them along K, one float32 scale for the matrix.

A number is code * float(group scale) * matrix scale. The matrix scale brings the largest magnitude to 6 * 448, the
reach of a code times the reach of a group scale. With `inputs` the checkpoint also holds the scale of the
activations that the matrix is multiplied with, measured beforehand; without, only the weights are coded (W4A16).
Source: ModelOpt's NVFP4 export (`weight`, `weight_scale`, `weight_scale_2`, `input_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from srt.layers.quant.codes import (
    E2M1_MAX,
    E4M3,
    E4M3_MAX,
    decode_e2m1,
    encode_e2m1,
    encode_e4m3,
    pack_nibbles,
    unpack_nibbles,
)
from srt.layers.quant.contract import WEIGHT, Grid, StoredWeight, product, require_finite

GROUP = 16
REACH = E2M1_MAX * E4M3_MAX
"""Largest magnitude that codes and group scales can express together: 2688."""
GROUP_SCALE = "group_scale"
MATRIX_SCALE = "matrix_scale"
INPUT_SCALE = "input_scale"


class Nvfp4:
    """Four-bit weights. The matrix scale has an entry for each part of rows (gate and up) that was stacked."""

    split_rows = 1
    split_columns = GROUP
    layer_wide = frozenset({INPUT_SCALE})

    def __init__(self, inputs: bool = True) -> None:
        self.inputs = inputs
        self.name = "nvfp4" if inputs else "nvfp4-a16"

    def grids(self) -> Mapping[str, Grid]:
        grids = {
            WEIGHT: Grid(torch.uint8, 1, 2),
            GROUP_SCALE: Grid(E4M3, 1, GROUP),
            MATRIX_SCALE: Grid(torch.float32, None, None),
        }
        return grids | ({INPUT_SCALE: Grid(torch.float32, None, None)} if self.inputs else {})

    def pack(self, weight: Tensor) -> StoredWeight:
        """Encode; an input scale is not known here and is 1 until calibration replaces it.

        Raises: ValueError if K does not divide by 16 or a value is not finite.
        """
        if weight.shape[-1] % GROUP:
            raise ValueError(f"{weight.shape[-1]} columns do not divide into groups of {GROUP}")
        wide = require_finite(weight)
        matrix = reach_scale(wide.abs().amax(dim=(-2, -1)))
        codes, group = encode_groups(wide, matrix[..., None, None])
        tensors = {WEIGHT: pack_nibbles(codes), GROUP_SCALE: group, MATRIX_SCALE: matrix[..., None]}
        if self.inputs:
            tensors[INPUT_SCALE] = torch.ones_like(tensors[MATRIX_SCALE])
        return StoredWeight(tuple(weight.shape), tensors)

    def unpack(self, stored: StoredWeight) -> Tensor:
        return self.unscaled(stored) * row_scale(stored)[..., None]

    def matmul(self, x: Tensor, stored: StoredWeight) -> Tensor:
        return product(x, self.unpack(stored))

    def matmul_coded(self, x: Tensor, stored: StoredWeight) -> Tensor:
        """Both operands coded. The activations' scale is the largest of the stored input scales."""
        scale = stored.tensors[INPUT_SCALE].max()
        codes, group = encode_groups(x, scale)
        total = product(unscaled_groups(codes, group), self.unscaled(stored))
        return (total * (scale * row_scale(stored))).to(x.dtype)

    def unscaled(self, stored: StoredWeight) -> Tensor:
        """Codes times group scales, exact in float32; the matrix scale is left out."""
        return unscaled_groups(unpack_nibbles(stored.weight), stored.tensors[GROUP_SCALE])


def row_scale(stored: StoredWeight) -> Tensor:
    """The matrix scale of each row: [.., N]."""
    scale = stored.tensors[MATRIX_SCALE]
    return scale.repeat_interleave(stored.shape[-2] // scale.shape[-1], dim=-1)


def encode_groups(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [.., K] with a given outer scale -> (e2m1 codes [.., K], e4m3 group scales [.., K / 16]).

    A group whose own scale rounds to zero has codes of zero.
    """
    outer = 1.0 / scale.float()
    groups = torch.unflatten(x.float(), -1, (-1, GROUP))
    largest = groups.abs().amax(dim=-1)
    group = encode_e4m3(largest / E2M1_MAX * outer)
    inner = group.float()[..., None]
    ratio = groups * outer[..., None] if outer.dim() else groups * outer
    codes = encode_e2m1(torch.where(inner > 0, ratio / inner, torch.zeros_like(groups)))
    return codes.flatten(-2), group


def unscaled_groups(codes: Tensor, group: Tensor) -> Tensor:
    """Codes [.., K] times group scales [.., K / 16], exact in float32."""
    return (torch.unflatten(decode_e2m1(codes), -1, (-1, GROUP)) * group.float()[..., None]).flatten(-2)


def reach_scale(largest: Tensor) -> Tensor:
    """The outer scale under which `largest` is the largest number; 1 where there are only zeros."""
    scale = (largest.float() / REACH).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scale, torch.ones_like(scale))
