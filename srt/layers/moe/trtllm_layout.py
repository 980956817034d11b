"""How TRT-LLM-Gen's grouped products want weights laid out, in plain torch.

The kernel's gated product takes the up rows as its first half and the gate rows as its second, a row of each in turn,
and all weights in the row order of its epilogue over 128 rows. Source: FlashInfer's `fused_moe/core.py`
(`get_reorder_rows_for_gated_act_gemm_row_indices`) and `utils.py` (`get_shuffle_matrix_a_row_indices`); tests compare
with those functions where FlashInfer is installed.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

TILE_ROWS: Final = 128
"""Rows of an epilogue tile; a weight's rows divide by this."""
SCALE_COLUMNS: Final = 4
BLOCK_BYTES: Final = 128
"""Bytes of K in one block of the block-major layout."""


def shuffled_rows(rows: int) -> Tensor:
    """Row to take for each row of a shuffled weight: in every 32, row 8i + j comes from row 4j + i."""
    return torch.arange(rows).view(-1, 8, 4).transpose(1, 2).flatten()


def gated_rows(width: int) -> Tensor:
    """Row of [gate; up] to take for each row of a shuffled gated weight, [2I]."""
    up, gate = torch.arange(width) + width, torch.arange(width)
    alternating = torch.stack((up, gate), dim=1).flatten()
    return alternating[shuffled_rows(2 * width)]


def up_first(gate_up: Tensor) -> Tensor:
    """[E, 2R, C] with the gate's rows first -> the same with the up rows first."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.cat((up, gate), dim=1)


def interleave_scales(scales: Tensor) -> Tensor:
    """Group scales [E, M, C] in tiles of 128 rows x 4 columns, row r of a tile at (r % 32) * 16 + r // 32 * 4.

    M divides by 128 and C by 4. The shape stays, the bytes move.
    """
    experts, rows, columns = scales.shape
    tiles = scales.view(experts, rows // TILE_ROWS, 4, 32, columns // SCALE_COLUMNS, SCALE_COLUMNS)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(experts, rows, columns)


def block_major(weight: Tensor) -> Tensor:
    """[E, M, K] -> [E, K / B, M, B] for blocks of 128 bytes."""
    size = BLOCK_BYTES // weight.element_size()
    blocks: Tensor = weight.unflatten(-1, (-1, size))
    return blocks.transpose(1, 2).contiguous()


def rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor[:, index] for any dtype of one byte or more: [E, M, C] -> [E, M, C]."""
    rows: Tensor = tensor.view(torch.uint8)[:, index.to(tensor.device)]
    return rows.view(tensor.dtype)
